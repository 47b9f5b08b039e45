// Runs the busybox beside it, as what it is called itself, from one vCPU on,
// which is chosen at random.
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

int main(int count, char **words) {
    static char path[4096];
    (void)count;
    ssize_t len = readlink("/proc/self/exe", path, sizeof path - sizeof "busybox");
    unsigned char draw;
    if (len < 0 || getrandom(&draw, 1, 0) != 1) return 125;
    strcpy(strrchr(path, '/') + 1, "busybox");
    cpu_set_t all, one;
    if (sched_getaffinity(0, sizeof all, &all)) return 125;
    int skip = draw % CPU_COUNT(&all), cpu = 0;
    while (!CPU_ISSET(cpu, &all) || skip-- > 0) cpu++;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    // It has its own again at once, and stays there unless it is moved.
    if (sched_setaffinity(0, sizeof one, &one) || sched_setaffinity(0, sizeof all, &all)) return 125;
    execv(path, words);
    perror(path);
    return 126;
}
