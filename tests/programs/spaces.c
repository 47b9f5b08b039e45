// Threads of one process on two processors map, fault, protect, unmap and fork
// against each other, and look whether what they see is what there must be.
// What it prints is the same wherever memory is coherent.
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { THREADS = 4, PAGES = 64, PAGE = 4096, ROUNDS = 40, FORKS = 10 };

static char *const area = (char *)0x200000000000;
static pthread_barrier_t all;
static volatile int gone, stop;
static long stale, torn, denied, missed, reached;
// Private memory that is written all the time, a page for each thread.
static volatile long counters[THREADS][PAGE / sizeof(long)] __attribute__((aligned(4096)));

static __thread sigjmp_buf back;

static void fault(int signal) {
    (void)signal;
    siglongjmp(back, 1);
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void add(long *count) { __atomic_fetch_add(count, 1, __ATOMIC_RELAXED); }

static volatile long *slot(int page, int thread) {
    return (volatile long *)(area + page * PAGE + thread * 64);
}

static int can_write(volatile long *word, long value) {
    if (sigsetjmp(back, 1)) return 0;
    *word = value;
    return 1;
}

// Reads until the page is gone. What was read after the unmapping had returned
// is stale; what is not the round's value is another's.
static void read_until_gone(volatile long *word, long value) {
    if (sigsetjmp(back, 1)) return;
    for (;;) {
        int late = gone;
        long seen = *word;
        if (late) add(&stale);
        if (seen != value) add(&torn);
        if (late || seen != value) return;
    }
}

static void *work(void *argument) {
    long me = (long)argument;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(me % 2, &set);
    if (sched_setaffinity(0, sizeof set, &set)) fail("sched_setaffinity");
    for (long round = 1; round <= ROUNDS; round++) {
        if (round % THREADS == me) {
            gone = 0;
            void *at = mmap(area, PAGES * PAGE, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
            if (at != area) fail("mmap");
        }
        pthread_barrier_wait(&all);
        // All fault on the same pages at once, from both ends.
        for (int page = 0; page < PAGES; page++)
            *slot(me % 2 ? page : PAGES - 1 - page, me) = round * 100 + me;
        pthread_barrier_wait(&all);
        for (int page = 0; page < PAGES; page++)
            for (int other = 0; other < THREADS; other++)
                if (*slot(page, other) != round * 100 + other) add(&missed);
        pthread_barrier_wait(&all);
        if ((round + 1) % THREADS == me && mprotect(area, PAGES / 2 * PAGE, PROT_READ)) fail("mprotect");
        pthread_barrier_wait(&all);
        int page = (round * 7 + me) % (PAGES / 2);
        if (can_write(slot(page, me), 0)) add(&reached);
        else add(&denied);
        if (*slot(page, me) != round * 100 + me) add(&missed);
        if (!can_write(slot(page + PAGES / 2, me), round * 100 + me)) add(&missed);
        pthread_barrier_wait(&all);
        if ((round + 2) % THREADS == me) {
            if (munmap(area, PAGES * PAGE)) fail("munmap");
            gone = 1;
        } else {
            read_until_gone(slot(round % PAGES, me), round * 100 + me);
        }
        pthread_barrier_wait(&all);
    }
    // One forks while the others write what is copied then.
    long mine = 0, lost = 0;
    if (me == 0) {
        for (int count = 0; count < FORKS; count++) {
            pid_t child = fork();
            if (child < 0) fail("fork");
            if (child == 0) {
                long first[THREADS], leaked = 0;
                for (int i = 1; i < THREADS; i++) first[i] = counters[i][0];
                for (int again = 0; again < 20; again++) {
                    sched_yield();
                    for (int i = 1; i < THREADS; i++) leaked += counters[i][0] != first[i];
                }
                for (int i = 1; i < THREADS; i++) counters[i][0] = -1;
                _exit(leaked ? 1 : 0);
            }
            int status;
            if (waitpid(child, &status, 0) != child) fail("waitpid");
            if (status) add(&stale);
        }
        stop = 1;
    } else {
        while (!stop) {
            counters[me][0]++;
            lost += counters[me][0] != ++mine;
        }
        if (lost) add(&torn);
    }
    return 0;
}

int main(void) {
    struct sigaction action = {.sa_handler = fault};
    sigaction(SIGSEGV, &action, 0);
    pthread_barrier_init(&all, 0, THREADS);
    pthread_t threads[THREADS];
    for (long me = 0; me < THREADS; me++)
        if (pthread_create(&threads[me], 0, work, (void *)me)) fail("pthread_create");
    for (int me = 0; me < THREADS; me++) pthread_join(threads[me], 0);
    printf("%ld stale, %ld of others, %ld missing, %ld writes denied, %ld not\n",
           stale, torn, missed, denied, reached);
    return 0;
}
