// Restartable sequences: who is interrupted in one begins again. What it
// prints is the same on every kernel.
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/rseq.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

static struct rseq *area(void) {
    return (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
}

// A sequence from 1 to 2, which goes on at 4 if it was interrupted.
#define SECTION(...) \
    ".pushsection __rseq_cs, \"aw\"\n.balign 32\n" \
    "3: .long 0, 0\n.quad 1f, 2f - 1f, 4f\n.popsection\n" \
    "lea 3b(%%rip), %%rax\n mov %%rax, %[section]\n" \
    "1:\n" __VA_ARGS__ "2:\n"
#define ABORT(signature) \
    ".pushsection __rseq_failure, \"ax\"\n.byte 0x0f, 0xb9, 0x3d\n.long " signature "\n" \
    "4: jmp %l[aborted]\n.popsection\n"

static volatile long entered;

// Stays in a sequence until it is interrupted there, or for a minute or so.
static int stay(void) {
    __asm__ volatile goto(SECTION("incq %[entered]\n mov $0x200000000, %%rcx\n 5: dec %%rcx\n jnz 5b\n")
                          ABORT("0x53053053")
                          : : [section] "m"(area()->rseq_cs), [entered] "m"(entered)
                          : "rax", "rcx", "memory", "cc" : aborted);
    return 0;
aborted:
    return 1;
}

static int stay_without_signature(void) {
    __asm__ volatile goto(SECTION("mov $0x200000000, %%rcx\n 5: dec %%rcx\n jnz 5b\n")
                          ABORT("0x53053054")
                          : : [section] "m"(area()->rseq_cs)
                          : "rax", "rcx", "memory", "cc" : aborted);
    return 0;
aborted:
    return 1;
}

// Adds one to a processor's own count, if it is still on that.
static int add(long *count, unsigned cpu) {
    __asm__ volatile goto(SECTION("cmp %[cpu], %[here]\n jne 4f\n mov %[count], %%rax\n pause\n inc %%rax\n mov %%rax, %[count]\n")
                          ABORT("0x53053053")
                          : : [section] "m"(area()->rseq_cs), [here] "m"(area()->cpu_id), [cpu] "r"(cpu), [count] "m"(*count)
                          : "rax", "memory", "cc" : aborted);
    return 1;
aborted:
    return 0;
}

static void go_to(pid_t thread, int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(thread, sizeof set, &set)) exit(3);
}

static volatile int handled;
static void handle(int number) { (void)number; handled++; }

static void *follow(void *thread) {
    go_to(0, 1);
    while (!entered) usleep(1000);
    usleep(20000);
    go_to((pid_t)(long)thread, 1);
    return 0;
}

static volatile int over;

static void *disturb(void *unused) {
    (void)unused;
    go_to(0, 0);
    while (!entered) usleep(1000);
    while (!over) usleep(1000);
    return 0;
}

static long counts[64][8];
enum { THREADS = 5, TIMES = 100000 };

static void *count(void *argument) {
    long me = (long)argument;
    for (long done = 0; done < TIMES;) {
        unsigned cpu = *(volatile unsigned *)&area()->cpu_id_start;
        done += add(&counts[cpu][0], cpu);
        if (done % 5000 == 0) go_to(0, (int)((done / 5000 + me) % 2));
    }
    return 0;
}

static long call(void *at, unsigned len, int flags, unsigned signature) {
    return syscall(SYS_rseq, at, len, flags, signature) ? -errno : 0;
}

static void *alone(void *unused) {
    static char other[64] __attribute__((aligned(32)));
    void *mine = area();
    (void)unused;
    printf("again %ld, another %ld, signed otherwise %ld, other flags %ld\n", call(mine, 32, 0, 0x53053053),
           call(other, 32, 0, 0x53053053), call(mine, 32, 0, 1), call(mine, 32, 4, 0x53053053));
    long ended = call(mine, 32, 1, 0x53053053);
    printf("ended %ld, none %d\n", ended, (int)area()->cpu_id);
    printf("twice %ld, ", call(mine, 32, 1, 0x53053053));
    printf("short %ld, odd %ld, ", call(other, 16, 0, 7), call(other + 4, 32, 0, 7));
    printf("new %ld, ", call(other, 32, 0, 7));
    printf("told %d\n", ((struct rseq *)other)->cpu_id == (unsigned)sched_getcpu());
    return 0;
}

int main(void) {
    pthread_t thread;
    printf("registered %d\n", (int)area()->cpu_id >= 0);
    for (int cpu = 0; cpu < 2; cpu++) {
        go_to(0, cpu);
        printf("on %u and %u\n", area()->cpu_id, area()->cpu_id_start);
    }

    // By a signal.
    struct sigaction action = {.sa_handler = handle};
    sigaction(SIGALRM, &action, 0);
    struct itimerval soon = {.it_value.tv_usec = 50000};
    setitimer(ITIMER_REAL, &soon, 0);
    int left;
    // Somebody else may have come before.
    do left = stay(); while (left && !handled);
    printf("signal: %d, %d handled, %d left\n", left, handled, area()->rseq_cs != 0);

    // By moving to another processor.
    go_to(0, 0);
    entered = 0;
    pthread_create(&thread, 0, follow, (void *)(long)gettid());
    do left = stay(); while (left && area()->cpu_id == 0);
    printf("moved: %d, to %u\n", left, area()->cpu_id);
    pthread_join(thread, 0);

    // By another thread on the same one.
    go_to(0, 0);
    entered = 0;
    pthread_create(&thread, 0, disturb, 0);
    printf("preempted: %d\n", stay());
    over = 1;
    pthread_join(thread, 0);

    // Counts of processors, without a lock or an atomic instruction.
    pthread_t threads[THREADS];
    cpu_set_t all;
    CPU_ZERO(&all);
    CPU_SET(0, &all);
    CPU_SET(1, &all);
    for (long me = 0; me < THREADS; me++) pthread_create(&threads[me], 0, count, (void *)me);
    for (int me = 0; me < THREADS; me++) pthread_join(threads[me], 0);
    printf("counted %ld of %d\n", counts[0][0] + counts[1][0], THREADS * TIMES);

    // Who would go on just anywhere dies, and so does who names nothing.
    fflush(stdout);
    for (int which = 0; which < 2; which++) {
        pid_t child = fork();
        if (!child) {
            setitimer(ITIMER_REAL, &soon, 0);
            if (which) *(volatile unsigned long *)&area()->rseq_cs = 8;
            stay_without_signature();
            while (which) {}
            _exit(9);
        }
        int status;
        waitpid(child, &status, 0);
        printf("died of %d\n", WTERMSIG(status));
    }
    // A child has what its parent had.
    fflush(stdout);
    if (!fork()) {
        int same = area()->cpu_id == (unsigned)sched_getcpu();
        long again = call(area(), 32, 0, 0x53053053);
        printf("child %d %ld\n", same, again);
        return 0;
    }
    wait(0);
    pthread_create(&thread, 0, alone, 0);
    pthread_join(thread, 0);
    return 0;
}
