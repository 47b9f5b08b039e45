// Robust locks, and locks that the kernel hands on, under threads of all vCPUs
// and a process that dies.
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static pthread_mutex_t *make(int shared, int inherits) {
    pthread_mutexattr_t attributes;
    pthread_mutex_t *lock = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutexattr_setpshared(&attributes, shared ? PTHREAD_PROCESS_SHARED : PTHREAD_PROCESS_PRIVATE);
    int bad = pthread_mutexattr_setprotocol(&attributes, inherits ? PTHREAD_PRIO_INHERIT : PTHREAD_PRIO_NONE);
    if (bad || pthread_mutex_init(lock, &attributes)) printf("no such lock\n");
    return lock;
}

static long sum;

static void *adds(void *lock) {
    for (int i = 0; i < 2000; i++) {
        pthread_mutex_lock(lock);
        sum++;
        pthread_mutex_unlock(lock);
    }
    return 0;
}

static void *dies_with_it(void *lock) {
    pthread_mutex_lock(lock);
    usleep(50000);
    return 0;
}

int main(void) {
    for (int kind = 0; kind < 4; kind++) {
        pthread_mutex_t *lock = make(kind & 1, kind >> 1);
        pthread_t threads[4];
        sum = 0;
        for (int i = 0; i < 4; i++) pthread_create(&threads[i], 0, adds, lock);
        for (int i = 0; i < 4; i++) pthread_join(threads[i], 0);
        printf("%d: sum %ld\n", kind, sum);
        pthread_create(&threads[0], 0, dies_with_it, lock);
        usleep(20000);
        struct timespec soon;
        clock_gettime(CLOCK_REALTIME, &soon);
        printf("%d ", pthread_mutex_timedlock(lock, &soon) == ETIMEDOUT);
        printf("%d ", pthread_mutex_trylock(lock) == EBUSY);
        printf("%d ", pthread_mutex_lock(lock) == EOWNERDEAD);
        pthread_mutex_consistent(lock);
        printf("%d ", pthread_mutex_unlock(lock));
        printf("%d\n", pthread_mutex_lock(lock));
        pthread_mutex_unlock(lock);
        pthread_join(threads[0], 0);
        if (kind & 1) {
            pid_t child = fork();
            if (child == 0) {
                dies_with_it(lock);
                _exit(0);
            }
            usleep(20000);
            printf("%d\n", pthread_mutex_lock(lock) == EOWNERDEAD);
            pthread_mutex_unlock(lock);
            printf("%d\n", pthread_mutex_lock(lock) == ENOTRECOVERABLE);
            waitpid(child, 0, 0);
        }
    }
}
