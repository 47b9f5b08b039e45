// What the vDSO says is what the calls say; what it prints is the same on
// every kernel, linked dynamically or statically.
#define _GNU_SOURCE
#include <elf.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

typedef int gettime(clockid_t, struct timespec *);
typedef int getday(struct timeval *, struct timezone *);
typedef time_t gettime_s(time_t *);
typedef int getplace(unsigned *, unsigned *, void *);

static char *image;
static gettime *now, *resolution;

// A function by its name, as a library without a loader finds it.
static void *find(const char *name) {
    Elf64_Ehdr *head = (void *)image;
    Elf64_Phdr *segment = (void *)(image + head->e_phoff);
    Elf64_Dyn *entry = 0;
    for (int i = 0; i < head->e_phnum; i++)
        if (segment[i].p_type == PT_DYNAMIC) entry = (void *)(image + segment[i].p_vaddr);
    Elf64_Sym *symbols = 0;
    char *names = 0;
    unsigned *hash = 0;
    for (; entry && entry->d_tag; entry++) {
        char *at = image + entry->d_un.d_ptr;
        if (entry->d_tag == DT_SYMTAB) symbols = (void *)at;
        if (entry->d_tag == DT_STRTAB) names = at;
        if (entry->d_tag == DT_HASH) hash = (void *)at;
    }
    for (unsigned i = 1; hash && i < hash[1]; i++)
        if (!strcmp(names + symbols[i].st_name, name) && symbols[i].st_shndx)
            return image + symbols[i].st_value;
    printf("%s is missing\n", name);
    exit(1);
}

static long ns(struct timespec time) { return time.tv_sec * 1000000000L + time.tv_nsec; }

static long asked(clockid_t clock) {
    struct timespec time;
    syscall(SYS_clock_gettime, clock, &time);
    return ns(time);
}

static long read_clock(clockid_t clock) {
    struct timespec time;
    if (now(clock, &time)) exit(2);
    return ns(time);
}

// Two threads on two processors hand the time to each other.
static long turn, last, backwards;

static void *hand(void *argument) {
    long me = (long)argument;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(me, &set);
    if (sched_setaffinity(0, sizeof set, &set)) exit(3);
    for (long round = 0; round < 20000; round++) {
        while (__atomic_load_n(&turn, __ATOMIC_ACQUIRE) % 2 != me) sched_yield();
        // One in eight asks the kernel.
        long time = round % 8 ? read_clock(CLOCK_MONOTONIC) : asked(CLOCK_MONOTONIC);
        if (time < last) backwards++;
        last = time;
        __atomic_fetch_add(&turn, 1, __ATOMIC_RELEASE);
    }
    return 0;
}

int main(int count, char **words) {
    image = (char *)getauxval(AT_SYSINFO_EHDR);
    if (!image) return puts("no vDSO"), 1;
    now = find("__vdso_clock_gettime");
    resolution = find("__vdso_clock_getres");
    getday *day = find("__vdso_gettimeofday");
    gettime_s *seconds = find("__vdso_time");
    getplace *place = find("__vdso_getcpu");

    // The same clocks.
    clockid_t clocks[] = {CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_MONOTONIC_RAW, CLOCK_BOOTTIME, CLOCK_PROCESS_CPUTIME_ID, CLOCK_THREAD_CPUTIME_ID};
    for (unsigned i = 0; i < sizeof clocks / sizeof *clocks; i++) {
        int bad = 0;
        for (int round = 0; round < 2000; round++) {
            long before = asked(clocks[i]), between = read_clock(clocks[i]), after = asked(clocks[i]);
            bad += before > between || between > after;
        }
        struct timespec one = {7, 7}, other = {8, 8};
        int same = resolution(clocks[i], &one) == syscall(SYS_clock_getres, clocks[i], &other) && ns(one) == ns(other);
        printf("clock %d: %d outside, resolution %s\n", clocks[i], bad, same ? "the same" : "another");
    }
    struct timespec none;
    printf("clock 77: %d\n", now(77, &none));
    struct timeval of_day;
    struct timezone zone = {5, 5};
    long before = asked(CLOCK_REALTIME) / 1000;
    day(&of_day, &zone);
    long after = asked(CLOCK_REALTIME) / 1000, time_of_day = of_day.tv_sec * 1000000L + of_day.tv_usec;
    printf("of day: %d, west %d, nothing %d\n", before <= time_of_day && time_of_day <= after, zone.tz_minuteswest, day(0, 0));
    time_t stored, told = seconds(&stored);
    printf("seconds: %d\n", told == stored && told >= of_day.tv_sec && seconds(0) <= asked(CLOCK_REALTIME) / 1000000000);

    // Where it is mapped.
    char line[200], name[100];
    FILE *maps = fopen("/proc/self/maps", "r");
    while (fgets(line, sizeof line, maps)) {
        unsigned long start;
        char rights[5];
        int found = sscanf(line, "%lx-%*x %4s %*s %*s %*s %99s", &start, rights, name);
        if (found == 3 && (!strcmp(name, "[vdso]") || !strcmp(name, "[vvar]")))
            printf("%s %s%s\n", name, rights, (char *)start == image ? ", where it is said to be" : "");
    }
    fclose(maps);

    // The processor, by this and by the library's own way.
    for (int wanted = 0; wanted < 2; wanted++) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(wanted, &set);
        sched_setaffinity(0, sizeof set, &set);
        unsigned cpu, node, real, real_node;
        place(&cpu, &node, 0);
        syscall(SYS_getcpu, &real, &real_node, 0);
        printf("processor %u %d %s\n", cpu, sched_getcpu(), real == cpu && real_node == node ? "truly" : "not so");
    }

    pthread_t threads[2];
    for (long me = 0; me < 2; me++) pthread_create(&threads[me], 0, hand, (void *)me);
    for (int me = 0; me < 2; me++) pthread_join(threads[me], 0);
    printf("%ld backwards\n", backwards);

    // Who sets the clock sets it for all: only done where it is nobody's.
    if (count < 2 || strcmp(words[1], "set")) return 0;
    struct timespec old;
    clock_gettime(CLOCK_REALTIME, &old);
    struct timespec later = {old.tv_sec + 5000, old.tv_nsec};
    int set = clock_settime(CLOCK_REALTIME, &later);
    long ahead = read_clock(CLOCK_REALTIME) - ns(old);
    fflush(stdout);
    pid_t child = fork();
    if (!child) _exit(read_clock(CLOCK_REALTIME) - ns(old) < 5000000000000L);
    int status;
    waitpid(child, &status, 0);
    clock_settime(CLOCK_REALTIME, &old);
    long back = read_clock(CLOCK_REALTIME) - ns(old);
    printf("set %d %d %d %d\n", set, ahead >= 5000000000000L, status, back >= 0 && back < 1000000000000L);
    return 0;
}
