/* The processes that a simulated Ollama is seen as.
 *
 * Started with "serve" as its first argument it stands for the server and takes orders on
 * standard input, one a line, answering each with one line:
 *
 *     start ARG0 ARG1 ...    start a runner with these arguments; answers its PID
 *     stop PID               kill a runner; answers "ok"
 *
 * Started otherwise it is a runner: it does nothing and dies with its parent. The server
 * exits at the end of its input, so nothing outlives the process that holds the pipe.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

enum { ARGUMENTS = 64 };

static void start_runner(char *words) {
    char *arguments[ARGUMENTS] = {0};
    int n = 0;
    for (char *word = strtok(words, " "); word && n < ARGUMENTS - 1; word = strtok(NULL, " ")) {
        arguments[n++] = word;
    }
    pid_t server = getpid();
    pid_t pid = n ? fork() : -1;
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != server) _exit(1); /* it died before the line above */
        execv("/proc/self/exe", arguments);
        _exit(1);
    }
    printf("%d\n", (int)pid);
}

int main(int argc, char **argv) {
    const char *slash = strrchr(argv[0], '/');
    prctl(PR_SET_NAME, slash ? slash + 1 : argv[0]);
    if (argc < 2 || strcmp(argv[1], "serve") != 0) {
        /* The pipe must end when the server's client goes, not when the runners do. */
        close(0);
        close(1);
        close(2);
        for (;;) pause();
    }
    signal(SIGCHLD, SIG_IGN); /* no zombies */
    signal(SIGINT, SIG_IGN);  /* Ctrl-C in a terminal is the client's to handle */
    setvbuf(stdout, NULL, _IOLBF, 0);
    static char line[8192];
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = 0;
        if (!strncmp(line, "start ", 6)) {
            start_runner(line + 6);
        } else if (!strncmp(line, "stop ", 5)) {
            pid_t pid = (pid_t)atoi(line + 5);
            if (pid > 1) kill(pid, SIGKILL);
            puts("ok");
        } else {
            puts("what?");
        }
    }
    return 0;
}
