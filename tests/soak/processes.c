// COUNT processes at once: each says that it lives, all are counted in /proc
// and ended.
#include <ctype.h>
#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int words, char **word) {
    int count = words > 1 ? atoi(word[1]) : 1000;
    int alive[2];
    char byte;
    // A leader of a session leads its group already.
    if (pipe(alive) || (getpgrp() != getpid() && setpgid(0, 0))) return 1;
    for (int i = 0; i < count; i++) {
        pid_t child = fork();
        if (child < 0) {
            printf("no process %d\n", i);
            kill(0, SIGKILL);
        }
        if (child == 0) {
            if (write(alive[1], "x", 1) != 1) _exit(1);
            pause();
        }
    }
    for (int i = 0; i < count; i++)
        if (read(alive[0], &byte, 1) != 1) return 1;
    int seen = 0;
    DIR *all = opendir("/proc");
    for (struct dirent *entry; all && (entry = readdir(all));)
        if (isdigit((unsigned char)entry->d_name[0])) seen++;
    signal(SIGTERM, SIG_IGN);
    kill(0, SIGTERM);
    int ended = 0;
    for (int status; wait(&status) > 0;) ended += WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM;
    printf("%d processes, %d ended, /proc showed %s\n", count, ended, seen > count ? "all" : "too few");
    return ended != count || seen <= count;
}
