/* Ways out of a chroot, each of which works there for root.  escape NAME [ARGUMENT...]
 *
 * Prints "out" and exits with 0 if it worked; else says what stopped it, and exits with 1. None does
 * any harm when it works: a file is opened and not written, a name is set to what it is already.
 *
 * cc -static -o escape escape.c */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <netinet/ether.h>
#include <netinet/ip.h>
#include <netinet/udp.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/klog.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <errno.h>
#include <unistd.h>

static int can_open(const char *path, int flags) { return open(path, flags | O_CLOEXEC) >= 0; }

/* chroot once more, with a directory from before in hand; then climb. man 2 chroot */
static int breakout(char **args) {
    int here = open("/", O_RDONLY);
    mkdir("/tmp/jail", 0755);
    if (chroot("/tmp/jail") || fchdir(here)) return 0;
    for (int i = 0; i < 64; i++) chdir("..");
    if (chroot(".")) return 0;
    return can_open(args[0], O_RDONLY);
}

/* process 1's root is the host's, if it is the host's process 1 */
static int first_root(char **args) {
    char path[4096];
    snprintf(path, sizeof path, "/proc/1/root%s", args[0]);
    return can_open(path, O_RDONLY);
}

static int mount_anything(char **args) { return mount("none", "/tmp", "tmpfs", 0, "") == 0; }

static int unmount_proc(char **args) { return umount2("/proc", MNT_DETACH) == 0; }

/* the device whose kind, major and minor are given, in each place where one may write */
static int make_device(char **args) {
    static const char *places[] = {"/tmp", "/dev", "/dev/shm", "/data"};
    int refused = 0;
    for (int i = 0; i < 4; i++) {
        char path[100];
        snprintf(path, sizeof path, "%s/escape-device", places[i]);
        unlink(path);
        if (mknod(path, 0600 | (args[0][0] == 'b' ? S_IFBLK : S_IFCHR), makedev(atoi(args[1]), atoi(args[2]))) == 0) {
            int opened = can_open(path, O_RDONLY | O_NONBLOCK);
            refused = errno;
            unlink(path);
            if (opened) return 1;
        }
    }
    errno = refused;
    return 0;
}

static int open_file(char **args) { return can_open(args[0], O_RDONLY | O_NONBLOCK); }

static int open_to_write(char **args) { return can_open(args[0], O_WRONLY | O_NONBLOCK); }

/* a file that the kernel runs, as root, on the host. CVE-2022-0492 */
static int release_agent(char **args) {
    mkdir("/tmp/cgroup", 0755);
    return mount("none", "/tmp/cgroup", "cgroup", 0, args[0]) == 0 && can_open("/tmp/cgroup/release_agent", O_WRONLY);
}

static int trace(char **args) {
    pid_t pid = atoi(args[0]);
    if (ptrace(PTRACE_ATTACH, pid, 0, 0)) return 0;
    waitpid(pid, NULL, __WALL);
    return ptrace(PTRACE_DETACH, pid, 0, 0) == 0;
}

static int kill_host(char **args) { return kill(atoi(args[0]), 0) == 0; }

/* a file by its number, whatever the path to it. The "shocker" of 2014 */
struct handle { struct file_handle head; unsigned char bytes[128]; };

static int print_handle(char **args) {
    struct handle handle = {{sizeof handle.bytes}};
    int mount_id;
    if (name_to_handle_at(AT_FDCWD, args[0], &handle.head, &mount_id, 0)) return 0;
    printf("%d ", handle.head.handle_type);
    for (unsigned i = 0; i < handle.head.handle_bytes; i++) printf("%02x", handle.head.f_handle[i]);
    puts("");
    return 1;
}

static int by_handle(char **args) { /* TYPE HEX PATH, of any file in the same file system */
    struct handle handle = {{strlen(args[1]) / 2, atoi(args[0])}};
    for (unsigned i = 0; i < handle.head.handle_bytes; i++) sscanf(args[1] + 2 * i, "%2hhx", &handle.head.f_handle[i]);
    return open_by_handle_at(open(args[2], O_RDONLY), &handle.head, O_RDONLY) >= 0;
}

/* a socket without a path, of a process of the host */
static int abstract_socket(char **args) {
    struct sockaddr_un address = {AF_UNIX};
    strcpy(address.sun_path + 1, args[0]);
    socklen_t length = offsetof(struct sockaddr_un, sun_path) + 1 + strlen(args[0]);
    return connect(socket(AF_UNIX, SOCK_STREAM, 0), (void *)&address, length) == 0;
}

/* what the host has on its own loopback, by a frame made by hand: LINK MAC ADDRESS PORT. CVE-2020-8558 */
static int loopback(char **args) {
    struct { struct iphdr ip; struct udphdr udp; char text[8]; } packet = {
        {.version = 4, .ihl = 5, .ttl = 64, .protocol = IPPROTO_UDP, .tot_len = htons(36), .daddr = inet_addr(args[2])},
        {.source = htons(4242), .dest = htons(atoi(args[3])), .len = htons(16)}, "escape"}, answer;
    struct sockaddr_ll wire = {AF_PACKET, htons(ETH_P_IP), if_nametoindex(args[0]), .sll_halen = ETH_ALEN};
    struct ether_addr *mac = ether_aton(args[1]);
    memcpy(wire.sll_addr, mac, ETH_ALEN);
    int handle = socket(AF_PACKET, SOCK_DGRAM, htons(ETH_P_IP));
    struct ifreq own;
    strcpy(own.ifr_name, args[0]);
    if (handle < 0 || ioctl(socket(AF_INET, SOCK_DGRAM, 0), SIOCGIFADDR, &own)) return 0;
    packet.ip.saddr = ((struct sockaddr_in *)&own.ifr_addr)->sin_addr.s_addr;
    unsigned sum = 0;
    for (unsigned i = 0; i < 10; i++) sum += ((unsigned short *)&packet.ip)[i];
    sum = (sum & 0xffff) + (sum >> 16);
    packet.ip.check = ~((sum & 0xffff) + (sum >> 16));
    if (sendto(handle, &packet, sizeof packet, 0, (void *)&wire, sizeof wire) < 0) return 0;
    setsockopt(handle, SOL_SOCKET, SO_RCVTIMEO, &(struct timeval){1}, sizeof(struct timeval));
    while (recv(handle, &answer, sizeof answer, 0) >= 0)
        if (answer.ip.protocol == IPPROTO_UDP && answer.udp.dest == packet.udp.source) return 1;
    return 0;
}

static int kernel_log(char **args) { return klogctl(10, NULL, 0) > 0; }

static int host_name(char **args) {
    struct utsname names;
    uname(&names);
    return sethostname(names.nodename, strlen(names.nodename)) == 0;
}

static int new_mount_namespace(char **args) { return unshare(CLONE_NEWNS) == 0; }

static int join_first_namespace(char **args) { return setns(open("/proc/1/ns/mnt", O_RDONLY), 0) == 0; }

/* what is no module at all is refused for another reason, to those who may try; some kernels load none */
static int load_module(char **args) { return syscall(SYS_init_module, "no module", 9UL, "") && (errno == ENOEXEC || errno == ENOSYS); }

static int add_key(char **args) { return syscall(SYS_add_key, "user", "escape", "x", 1UL, -2L) > 0; }

/* descriptors that someone has left open */
static int descriptors(char **args) {
    for (int descriptor = 3; descriptor < 1024; descriptor++)
        if (fcntl(descriptor, F_GETFD) >= 0) return 1;
    errno = EBADF;
    return 0;
}

static int here(char **args) { /* a file above the working directory, however far up that goes */
    char path[4096] = "";
    for (int i = 0; i < 32; i++) strcat(path, "../");
    strcat(path, args[0]);
    return can_open(path, O_RDONLY);
}

static const struct { const char *name; int (*works)(char **); } ways[] = {
    {"breakout", breakout}, {"first-root", first_root}, {"mount", mount_anything}, {"unmount", unmount_proc},
    {"device", make_device}, {"open", open_file}, {"write", open_to_write}, {"release-agent", release_agent},
    {"trace", trace}, {"kill", kill_host}, {"print-handle", print_handle}, {"by-handle", by_handle},
    {"abstract-socket", abstract_socket}, {"loopback", loopback}, {"kernel-log", kernel_log}, {"host-name", host_name},
    {"unshare", new_mount_namespace}, {"setns", join_first_namespace}, {"module", load_module},
    {"key", add_key}, {"descriptors", descriptors}, {"here", here},
};

int main(int count, char **args) {
    for (unsigned i = 0; i < sizeof ways / sizeof *ways; i++)
        if (count > 1 && !strcmp(args[1], ways[i].name)) {
            errno = 0;
            if (ways[i].works(args + 2)) return strncmp(args[1], "print", 5) ? puts("out") < 0 : 0;
            printf("%s: %s\n", args[1], strerror(errno));
            return 1;
        }
    return 2;
}
