// Forks and waits COUNT times: at the end the memory that is free is to be
// what it was after the first tenth, but for less than 1 MiB.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static long free_kib(void) {
    char line[128];
    long kib = -1;
    FILE *file = fopen("/proc/meminfo", "r");
    while (file && fgets(line, sizeof line, file))
        if (!strncmp(line, "MemFree:", 8)) kib = atol(line + 8);
    if (file) fclose(file);
    return kib;
}

static void forks(long count) {
    for (long i = 0; i < count; i++) {
        int status;
        pid_t child = fork();
        if (child == 0) _exit(i & 0x7f);
        if (child < 0 || waitpid(child, &status, 0) != child || WEXITSTATUS(status) != (i & 0x7f)) {
            printf("fork %ld failed\n", i);
            exit(1);
        }
    }
}

int main(int words, char **word) {
    long count = words > 1 ? atol(word[1]) : 100000;
    forks(count / 10);
    long before = free_kib();
    forks(count - count / 10);
    long gone = before - free_kib();
    printf("%ld forks, %ld KiB left behind\n", count, gone);
    return before < 0 || gone >= 1024;
}
