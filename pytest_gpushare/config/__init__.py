"""What the user wrote: options and where they come from."""
