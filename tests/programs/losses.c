// What a process loses with a node, of two with a processor each: node 1 is
// killed between "ready" and the file /tmp/go.
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { BYTES = 1 << 20, PAGE = 4096 };

static volatile unsigned long there, here, stop;
static unsigned char *memory[2];
static sigjmp_buf back;
static volatile int code;
static void *volatile fault;

static void on(int processor) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(processor, &set);
    if (sched_setaffinity(0, sizeof set, &set)) perror("affinity");
}

static void *compute_there(void *nothing) {
    on(1);
    for (;;) there++;
    return nothing;
}

static void *compute_here(void *nothing) {
    on(0);
    while (!stop) here++;
    return nothing;
}

static void *touch_there(void *nothing) {
    on(1);
    memset(memory[1], 1, BYTES);
    return nothing;
}

// A word there: of lost memory nobody can say that it has changed.
static long futex(int operation, unsigned value, long other) {
    return syscall(SYS_futex, memory[1], operation, value, other, memory[1], 0);
}

static void *wait_for_word(void *result) {
    on(0);
    *(long *)result = futex(FUTEX_WAIT_PRIVATE, 0x01010101, 0);
    return result;
}

static void on_sigbus(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)context;
    code = info->si_code;
    fault = info->si_addr;
    siglongjmp(back, 1);
}

// How many pages give SIGBUS, as Linux does for memory that has failed.
static int lost(unsigned char *start) {
    volatile int count = 0;
    for (volatile int at = 0; at < BYTES; at += PAGE) {
        if (sigsetjmp(back, 1)) {
            count += code == BUS_MCEERR_AR && fault == start + at;
        } else if (((volatile unsigned char *)start)[at] != 1) {
            return -1;
        }
    }
    return count;
}

int main(void) {
    pthread_t threads[4];
    long waited = -1;
    setlinebuf(stdout);
    on(0);
    for (int node = 0; node < 2; node++) {
        int flags = MAP_PRIVATE | MAP_ANONYMOUS;
        memory[node] = mmap(0, BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
    }
    memset(memory[0], 1, BYTES);
    pthread_create(&threads[0], 0, touch_there, 0);
    pthread_join(threads[0], 0);
    pthread_create(&threads[3], 0, wait_for_word, &waited);
    while (futex(FUTEX_REQUEUE_PRIVATE, 0, 1) != 1) usleep(1000);
    pthread_create(&threads[1], 0, compute_there, 0);
    pthread_create(&threads[2], 0, compute_here, 0);
    while (!there || !here) usleep(1000);
    printf("ready\n");
    while (access("/tmp/go", F_OK)) usleep(1000);
    // Its thread there ends, and the other one doesn't.
    pthread_join(threads[1], 0);
    unsigned long before = here, last = there;
    while (here == before) usleep(1000);
    stop = 1;
    pthread_join(threads[2], 0);
    printf("thread %s\n", there == last ? "lost" : "goes on");
    pthread_join(threads[3], 0);
    printf("waited %ld\n", waited);

    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO};
    sigaction(SIGBUS, &action, 0);
    printf("here %d pages lost\n", lost(memory[0]));
    printf("there %s\n", lost(memory[1]) == BYTES / PAGE ? "all lost" : "not all lost");
    int pipes[2];
    if (pipe(pipes)) return 1;
    printf("write %zd", write(pipes[1], memory[1], 10));
    printf(" %s\n", strerror(errno));
    madvise(memory[1], BYTES, MADV_DONTNEED);
    memset(memory[1], 1, BYTES);
    printf("anew %d pages lost\n", lost(memory[1]));
    return 0;
}
