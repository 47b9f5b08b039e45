// How page faults and computing of one process scale from one node to two.
//
// Usage: scaling, with processors 0 and 1 on two nodes. Prints for each work
// the time on processor 0 alone and on both, and the ratio; medians of rounds
// that take turns, so that a drift of the machine falls on both.
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

enum { MOST = 4, ROUNDS = 7, PAGE = 4096, PAGES = 4096, STEPS = 40000000 };

static pthread_barrier_t ready;
static int spread;
static volatile unsigned long sink[MOST * 8];

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

static void pin(long cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set)) fail("sched_setaffinity");
}

// First touches of memory of its own, in small pages.
static void *faults(void *argument) {
    pin(spread ? (long)argument % 2 : 0);
    char *memory = mmap(0, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("mmap");
    madvise(memory, PAGES * PAGE, MADV_NOHUGEPAGE);
    pthread_barrier_wait(&ready);
    for (int page = 0; page < PAGES; page++) *(volatile char *)(memory + page * PAGE) = 1;
    pthread_barrier_wait(&ready);
    munmap(memory, PAGES * PAGE);
    return 0;
}

static void *compute(void *argument) {
    long me = (long)argument;
    pin(spread ? me % 2 : 0);
    pthread_barrier_wait(&ready);
    unsigned long state = me + 1;
    for (int step = 0; step < STEPS; step++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
    }
    sink[me * 8] = state;
    pthread_barrier_wait(&ready);
    return 0;
}

static double once(void *(*work)(void *), int count) {
    pthread_t threads[MOST];
    pthread_barrier_init(&ready, 0, count + 1);
    for (long me = 0; me < count; me++)
        if (pthread_create(&threads[me], 0, work, (void *)me)) fail("pthread_create");
    pin(0);
    pthread_barrier_wait(&ready);
    double start = now();
    pthread_barrier_wait(&ready);
    double time = now() - start;
    for (int me = 0; me < count; me++) pthread_join(threads[me], 0);
    pthread_barrier_destroy(&ready);
    return time;
}

static int order(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void compare(const char *name, void *(*work)(void *), int count, double unit, const char *of) {
    double times[2][ROUNDS];
    for (int round = -1; round < ROUNDS; round++)
        for (spread = 0; spread < 2; spread++) {
            double time = once(work, count);
            // The first round warms up.
            if (round >= 0) times[spread][round] = time;
        }
    for (int i = 0; i < 2; i++) qsort(times[i], ROUNDS, sizeof(double), order);
    double one = times[0][ROUNDS / 2], two = times[1][ROUNDS / 2];
    printf("%-28s one node %8.1f %s   two nodes %8.1f %s   ratio %.2f\n",
           name, one * unit, of, two * unit, of, one / two);
    fflush(stdout);
}

int main(void) {
    compare("page faults, 4 threads", faults, 4, 1e9 / (4.0 * PAGES), "ns");
    compare("computing, 2 threads", compute, 2, 1e3, "ms");
    return 0;
}
