"""Several hosts: workers on other machines, over ssh, sized by the devices of each machine."""
