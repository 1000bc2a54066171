// A process that holds the memory of this one, and nothing else, until this one has ended.
//
// When a process is killed, the kernel first takes its memory back, page by page, and only then closes its sockets: 30 ms
// for each GB, in which nobody can tell that it is dead. Memory that somebody else holds is not taken back, so the sockets
// close at once.
#define _GNU_SOURCE
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

static char stack[1 << 14] __attribute__((aligned(64)));

// It runs beside the thread that made it, with that thread's thread-local memory: nothing of the C library that uses any.
static int keep(void *owner) {
    syscall(SYS_close_range, 0, ~0U, 0);
    syscall(SYS_prctl, PR_SET_NAME, "herd-keeper", 0, 0, 0);
    struct pollfd ended = {.fd = (int)syscall(SYS_pidfd_open, (long)owner, 0), .events = POLLIN};
    if (ended.fd >= 0) syscall(SYS_ppoll, &ended, 1, 0, 0, 0);
    syscall(SYS_exit_group, 0);
    return 0;
}

// Its process id, or -1. Call it once.
int herd_keep(void) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // No handler of ours is to run there.
    int keeper = clone(keep, stack + sizeof(stack), CLONE_VM, (void *)(long)getpid());
    pthread_sigmask(SIG_SETMASK, &before, 0);
    return keeper;
}
