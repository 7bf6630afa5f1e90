/* Preloaded, it makes the moment before a wait for a child a second long: time for a signal to come just then.
 *
 * cc -shared -fPIC -o nap.so nap.c */
#define _GNU_SOURCE
#include <sys/wait.h>
#include <time.h>

pid_t waitpid(pid_t pid, int *status, int options) {
    struct timespec left = {1, 0};
    while (nanosleep(&left, &left) < 0) {
    }
    return wait4(pid, status, options, NULL);
}
