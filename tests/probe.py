#!/usr/bin/env python3
"""What does a process see, and what may it do?  Prints the answer as one JSON object.

Run it inside a container, and the same under Docker; then compare:

    docker run IMAGE python3 -c "$(cat probe.py)" > docker.json     # nothing to mount, nothing to copy
    mocker run IMAGE python3 -c "$(cat probe.py)" > mocker.json
    probe.py --diff docker.json mocker.json       # only what differs; status 1 if anything does
    probe.py process mounts                       # only these parts; the system calls take longest
    probe.py --ns                                 # the namespaces of the caller, to compare "raw" with

"compare" is flat, and equal for two equal containers: random parts (ids, host name, pipe numbers)
are replaced by <ID>, <HOSTNAME>, <N>. "raw" holds what differs by nature: namespaces, addresses, ids.
Nothing here changes anything outside the container: every call has harmless arguments, each in a
forked child. Standard library only, Python 3.9+, x86_64 and aarch64.
"""
import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import re
import resource
import select
import signal
import socket
import stat
import struct
import sys
import time

# name:x86_64:aarch64, up to Linux 6.19
TABLE = """
read:0:63 write:1:64 open:2:- close:3:57 stat:4:- fstat:5:80 lstat:6:- poll:7:- lseek:8:62 mmap:9:222
mprotect:10:226 munmap:11:215 brk:12:214 rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139
ioctl:16:29 pread64:17:67 pwrite64:18:68 readv:19:65 writev:20:66 access:21:- pipe:22:- select:23:-
sched_yield:24:124 mremap:25:216 msync:26:227 mincore:27:232 madvise:28:233 shmget:29:194 shmat:30:196
shmctl:31:195 dup:32:23 dup2:33:- pause:34:- nanosleep:35:101 getitimer:36:102 alarm:37:- setitimer:38:103
getpid:39:172 sendfile:40:71 socket:41:198 connect:42:203 accept:43:202 sendto:44:206 recvfrom:45:207
sendmsg:46:211 recvmsg:47:212 shutdown:48:210 bind:49:200 listen:50:201 getsockname:51:204 getpeername:52:205
socketpair:53:199 setsockopt:54:208 getsockopt:55:209 clone:56:220 fork:57:- vfork:58:- execve:59:221
exit:60:93 wait4:61:260 kill:62:129 uname:63:160 semget:64:190 semop:65:193 semctl:66:191 shmdt:67:197
msgget:68:186 msgsnd:69:189 msgrcv:70:188 msgctl:71:187 fcntl:72:25 flock:73:32 fsync:74:82 fdatasync:75:83
truncate:76:45 ftruncate:77:46 getdents:78:- getcwd:79:17 chdir:80:49 fchdir:81:50 rename:82:- mkdir:83:-
rmdir:84:- creat:85:- link:86:- unlink:87:- symlink:88:- readlink:89:- chmod:90:- fchmod:91:52 chown:92:-
fchown:93:55 lchown:94:- umask:95:166 gettimeofday:96:169 getrlimit:97:163 getrusage:98:165 sysinfo:99:179
times:100:153 ptrace:101:117 getuid:102:174 syslog:103:116 getgid:104:176 setuid:105:146 setgid:106:144
geteuid:107:175 getegid:108:177 setpgid:109:154 getppid:110:173 getpgrp:111:- setsid:112:157 setreuid:113:145
setregid:114:143 getgroups:115:158 setgroups:116:159 setresuid:117:147 getresuid:118:148 setresgid:119:149
getresgid:120:150 getpgid:121:155 setfsuid:122:151 setfsgid:123:152 getsid:124:156 capget:125:90 capset:126:91
rt_sigpending:127:136 rt_sigtimedwait:128:137 rt_sigqueueinfo:129:138 rt_sigsuspend:130:133
sigaltstack:131:132 utime:132:- mknod:133:- uselib:134:- personality:135:92 ustat:136:- statfs:137:43
fstatfs:138:44 sysfs:139:- getpriority:140:141 setpriority:141:140 sched_setparam:142:118
sched_getparam:143:121 sched_setscheduler:144:119 sched_getscheduler:145:120 sched_get_priority_max:146:125
sched_get_priority_min:147:126 sched_rr_get_interval:148:127 mlock:149:228 munlock:150:229 mlockall:151:230
munlockall:152:231 vhangup:153:58 modify_ldt:154:- pivot_root:155:41 _sysctl:156:- prctl:157:167
arch_prctl:158:- adjtimex:159:171 setrlimit:160:164 chroot:161:51 sync:162:81 acct:163:89 settimeofday:164:170
mount:165:40 umount2:166:39 swapon:167:224 swapoff:168:225 reboot:169:142 sethostname:170:161
setdomainname:171:162 iopl:172:- ioperm:173:- create_module:174:- init_module:175:105 delete_module:176:106
get_kernel_syms:177:- query_module:178:- quotactl:179:60 nfsservctl:180:42 getpmsg:181:- putpmsg:182:-
afs_syscall:183:- tuxcall:184:- security:185:- gettid:186:178 readahead:187:213 setxattr:188:5 lsetxattr:189:6
fsetxattr:190:7 getxattr:191:8 lgetxattr:192:9 fgetxattr:193:10 listxattr:194:11 llistxattr:195:12
flistxattr:196:13 removexattr:197:14 lremovexattr:198:15 fremovexattr:199:16 tkill:200:130 time:201:-
futex:202:98 sched_setaffinity:203:122 sched_getaffinity:204:123 set_thread_area:205:- io_setup:206:0
io_destroy:207:1 io_getevents:208:4 io_submit:209:2 io_cancel:210:3 get_thread_area:211:-
lookup_dcookie:212:18 epoll_create:213:- epoll_ctl_old:214:- epoll_wait_old:215:- remap_file_pages:216:234
getdents64:217:61 set_tid_address:218:96 restart_syscall:219:128 semtimedop:220:192 fadvise64:221:223
timer_create:222:107 timer_settime:223:110 timer_gettime:224:108 timer_getoverrun:225:109 timer_delete:226:111
clock_settime:227:112 clock_gettime:228:113 clock_getres:229:114 clock_nanosleep:230:115 exit_group:231:94
epoll_wait:232:- epoll_ctl:233:21 tgkill:234:131 utimes:235:- vserver:236:- mbind:237:235
set_mempolicy:238:237 get_mempolicy:239:236 mq_open:240:180 mq_unlink:241:181 mq_timedsend:242:182
mq_timedreceive:243:183 mq_notify:244:184 mq_getsetattr:245:185 kexec_load:246:104 waitid:247:95
add_key:248:217 request_key:249:218 keyctl:250:219 ioprio_set:251:30 ioprio_get:252:31 inotify_init:253:-
inotify_add_watch:254:27 inotify_rm_watch:255:28 migrate_pages:256:238 openat:257:56 mkdirat:258:34
mknodat:259:33 fchownat:260:54 futimesat:261:- newfstatat:262:79 unlinkat:263:35 renameat:264:38 linkat:265:37
symlinkat:266:36 readlinkat:267:78 fchmodat:268:53 faccessat:269:48 pselect6:270:72 ppoll:271:73
unshare:272:97 set_robust_list:273:99 get_robust_list:274:100 splice:275:76 tee:276:77 sync_file_range:277:84
vmsplice:278:75 move_pages:279:239 utimensat:280:88 epoll_pwait:281:22 signalfd:282:- timerfd_create:283:85
eventfd:284:- fallocate:285:47 timerfd_settime:286:86 timerfd_gettime:287:87 accept4:288:242 signalfd4:289:74
eventfd2:290:19 epoll_create1:291:20 dup3:292:24 pipe2:293:59 inotify_init1:294:26 preadv:295:69
pwritev:296:70 rt_tgsigqueueinfo:297:240 perf_event_open:298:241 recvmmsg:299:243 fanotify_init:300:262
fanotify_mark:301:263 prlimit64:302:261 name_to_handle_at:303:264 open_by_handle_at:304:265
clock_adjtime:305:266 syncfs:306:267 sendmmsg:307:269 setns:308:268 getcpu:309:168 process_vm_readv:310:270
process_vm_writev:311:271 kcmp:312:272 finit_module:313:273 sched_setattr:314:274 sched_getattr:315:275
renameat2:316:276 seccomp:317:277 getrandom:318:278 memfd_create:319:279 kexec_file_load:320:294 bpf:321:280
execveat:322:281 userfaultfd:323:282 membarrier:324:283 mlock2:325:284 copy_file_range:326:285 preadv2:327:286
pwritev2:328:287 pkey_mprotect:329:288 pkey_alloc:330:289 pkey_free:331:290 statx:332:291
io_pgetevents:333:292 rseq:334:293 uretprobe:335:- uprobe:336:- pidfd_send_signal:424:424
io_uring_setup:425:425 io_uring_enter:426:426 io_uring_register:427:427 open_tree:428:428 move_mount:429:429
fsopen:430:430 fsconfig:431:431 fsmount:432:432 fspick:433:433 pidfd_open:434:434 clone3:435:435
close_range:436:436 openat2:437:437 pidfd_getfd:438:438 faccessat2:439:439 process_madvise:440:440
epoll_pwait2:441:441 mount_setattr:442:442 quotactl_fd:443:443 landlock_create_ruleset:444:444
landlock_add_rule:445:445 landlock_restrict_self:446:446 memfd_secret:447:447 process_mrelease:448:448
futex_waitv:449:449 set_mempolicy_home_node:450:450 cachestat:451:451 fchmodat2:452:452
map_shadow_stack:453:453 futex_wake:454:454 futex_wait:455:455 futex_requeue:456:456 statmount:457:457
listmount:458:458 lsm_get_self_attr:459:459 lsm_set_self_attr:460:460 lsm_list_modules:461:461 mseal:462:462
setxattrat:463:463 getxattrat:464:464 listxattrat:465:465 removexattrat:466:466 open_tree_attr:467:467
file_getattr:468:468 file_setattr:469:469 listns:470:470"""
ARCH = platform.machine()
NR = {name: int(number) for name, *numbers in (entry.split(":") for entry in TABLE.split())
      for number in [numbers[ARCH == "aarch64"]] if number != "-"}
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
BUFFER = ctypes.create_string_buffer(4096)
compare, raw = {}, {}


def name_of(number):
    """1 -> EPERM"""
    return errno.errorcode.get(number, str(number))


def syscall(number, *args):
    """One system call: 'ok' or the name of its error."""
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args])
    return "ok" if result >= 0 else name_of(ctypes.get_errno())


def attempt(action, *arguments, new_session=True, seconds=3):
    """Run action(*arguments) in a forked child; what it returns, or raises, or how it ends."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            if new_session:
                os.setsid()     # so that vhangup and the like have no terminal to hit
            answer = action(*arguments) or "ok"
        except OSError as error:
            answer = name_of(error.errno)
        except BaseException as error:      # the child must never return into the caller
            answer = repr(error)
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], seconds)
    answer = os.read(reader, 4096).decode() if ready else "blocks"
    os.close(reader)
    if not ready:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if answer:
        return answer
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"


def machine_code(code):
    """Run code, a function without arguments, from memory; its result as 'ok' or an error's name."""
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(code)
    function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
    result = function()
    return "ok" if result >= 0 else name_of(-result)


def int80(number, ebx=0xFFFFFFFF):
    """The 32-bit entry: push rbx; mov eax, number; mov ebx, …; ecx, edx, esi, edi = -1; int 0x80; pop rbx; ret"""
    return machine_code(b"\x53\xb8" + struct.pack("<I", number) + b"\xbb" + struct.pack("<I", ebx)
                        + b"".join(bytes([op]) + b"\xff\xff\xff\xff" for op in (0xB9, 0xBA, 0xBE, 0xBF))
                        + b"\xcd\x80\x5b\xc3")


def fork_and_reap(number, *args):
    """fork, clone, clone3: the new child ends at once."""
    result = libc.syscall(ctypes.c_long(number), *args)
    if result == 0:
        os._exit(0)
    if result < 0:
        return name_of(ctypes.get_errno())
    os.waitpid(result, 0x40000000)      # __WALL
    return "ok"


def vfork():
    """vfork's child shares the stack, so it must leave without a return: exit(0) right there.
    mov eax, 58; syscall; test eax, eax; jnz +9; xor edi, edi; mov eax, 60; syscall; ret"""
    return machine_code(b"\xb8\x3a\0\0\0\x0f\x05\x85\xc0\x75\x09\x31\xff\xb8\x3c\0\0\0\x0f\x05\xc3")


# ---------------------------------------------------------------- system calls

def clone3(flags=0, size=64):
    arguments = struct.pack("=8Q", flags, 0, 0, 0, signal.SIGCHLD, 0, 0, 0)
    return lambda: fork_and_reap(NR["clone3"], ctypes.c_char_p(arguments), ctypes.c_long(size))


# The arguments of every call are six times -1: a bad descriptor, a bad address, a bad flag.
# Those for which this would be too much, or too little:
SPECIAL = {
    "fork": lambda: fork_and_reap(NR["fork"]),
    "vfork": vfork,
    "clone": lambda: fork_and_reap(NR["clone"], *map(ctypes.c_long, (signal.SIGCHLD, 0, 0, 0, 0))),
    "clone3": clone3(),
    "unshare": lambda: syscall(NR["unshare"], 0),
    "futex": lambda: syscall(NR["futex"], BUFFER, 1, 1),                    # FUTEX_WAKE, nobody waits
    "kill": lambda: syscall(NR["kill"], os.getpid(), 0),
    "tkill": lambda: syscall(NR["tkill"], os.getpid(), 0),
    "tgkill": lambda: syscall(NR["tgkill"], os.getpid(), os.getpid(), 0),
    "msgget": lambda: syscall(NR["msgget"], 1, 0),                          # -1 would create a queue
    "shmget": lambda: syscall(NR["shmget"], 1, 0, 0),
    "semget": lambda: syscall(NR["semget"], 1, 0, 0),
    "init_module": lambda: syscall(NR["init_module"], BUFFER, 0, BUFFER),
    "modify_ldt": lambda: syscall(NR["modify_ldt"], 0, BUFFER, 0),
    "chroot": lambda: syscall(NR["chroot"], b"/"),
    "ptrace": lambda: syscall(NR["ptrace"], 0, 0, 0, 0),                    # PTRACE_TRACEME
    "personality": lambda: syscall(NR["personality"], 0xFFFFFFFF),          # which one is it?
    "set_tid_address": lambda: syscall(NR["set_tid_address"], 0),
    "brk": lambda: syscall(NR["brk"], 0),
    "acct": lambda: syscall(NR["acct"], b"/nonexistent"),                   # NULL would turn it off
    "keyctl": lambda: syscall(NR["keyctl"], 0, -3, 0),                      # the session keyring's id
}


def try_syscalls():
    """Every system call by its number."""
    for name, number in NR.items():
        action = SPECIAL.get(name, lambda number=number: syscall(number, *[-1] * 6))
        seconds = 0.2 if name == "pause" else 5
        compare[f"syscall.{name}"] = attempt(action, new_session=name != "setsid", seconds=seconds)
    for number in (450, 471, 500, 600, 100000):      # those that nobody knows: how does the filter end?
        if number not in NR.values():
            compare[f"syscall.number {number}"] = attempt(syscall, number, *[-1] * 6)


NAMESPACES = {"NEWTIME": 0x80, "NEWNS": 0x20000, "NEWCGROUP": 0x2000000, "NEWUTS": 0x4000000, "NEWIPC": 0x8000000,
              "NEWUSER": 0x10000000, "NEWPID": 0x20000000, "NEWNET": 0x40000000}
FAMILIES = {1: "UNIX", 2: "INET", 3: "AX25", 10: "INET6", 15: "KEY", 16: "NETLINK", 17: "PACKET", 21: "RDS",
            26: "LLC", 29: "CAN", 30: "TIPC", 31: "BLUETOOTH", 38: "ALG", 40: "VSOCK", 41: "KCM", 44: "XDP", 45: "MCTP"}
KEYCTL = {"JOIN_SESSION_KEYRING": 1, "DESCRIBE": 6, "GET_PERSISTENT": 22}


def case(name, action, *arguments, **options):
    compare[f"case.{name}"] = attempt(action, *arguments, **options)


def try_arguments():
    """The calls that a filter judges by their arguments, and other doors to the same rooms."""
    for name, flag in NAMESPACES.items():
        if name != "NEWTIME":       # clone has no room for it: the low byte is the signal
            case(f"clone {name}", fork_and_reap, NR["clone"], *map(ctypes.c_long, (flag | signal.SIGCHLD, 0, 0, 0, 0)))
        case(f"clone3 {name}", clone3(flag))
        case(f"unshare {name}", syscall, NR["unshare"], flag)
        own = {"NEWNS": "mnt"}.get(name, name[3:].lower())
        case(f"setns {name}", join_namespace, own, flag)
    case("unshare NEWUSER|NEWNS", lambda: syscall(NR["unshare"], 0x10020000))
    case("clone high bits", lambda: syscall(NR["clone"], 0x7E02000000000000 | 0x10100))      # only the low 32 count
    for value in (0, 8, 0x20000, 0x20008, 0xFFFFFFFF, 0x40000, 0x400000, 0x8000000, 1, 0x20001):
        case(f"personality {value:#x}", syscall, NR["personality"], value)
    for family in range(46):
        name = FAMILIES.get(family, str(family))
        if family in FAMILIES:
            case(f"socket {name} DGRAM", syscall, NR["socket"], family, socket.SOCK_DGRAM, 0)
            case(f"socket {name} RAW", syscall, NR["socket"], family, socket.SOCK_RAW, 0)
        case(f"socket {name} STREAM", syscall, NR["socket"], family, socket.SOCK_STREAM, 0)
    case("socket VSOCK, high bits", lambda: syscall(NR["socket"], (1 << 32) | 40, socket.SOCK_STREAM, 0))
    case("socket INET DGRAM ICMP", lambda: syscall(NR["socket"], 2, socket.SOCK_DGRAM, 1))
    case("socket INET RAW ICMP", lambda: syscall(NR["socket"], 2, socket.SOCK_RAW, 1))
    for protocol in (0, 4, 9, 12, 15, 16):
        case(f"socket NETLINK {protocol}", syscall, NR["socket"], 16, socket.SOCK_RAW, protocol)
    case("socketpair VSOCK", lambda: syscall(NR["socketpair"], 40, socket.SOCK_STREAM, 0, BUFFER))
    case("ioctl TIOCSTI", lambda: syscall(NR["ioctl"], 0, 0x5412, b" "), new_session=False)
    case("ioctl TIOCSTI, high bits", lambda: syscall(NR["ioctl"], 0, (1 << 32) | 0x5412, b" "), new_session=False)
    case("ioctl TIOCLINUX", lambda: syscall(NR["ioctl"], 0, 0x541C, b"\x06"), new_session=False)
    for name, number in KEYCTL.items():
        case(f"keyctl {name}", syscall, NR["keyctl"], number, 0, 0, 0, 0)
    case("add_key", lambda: syscall(NR["add_key"], b"user", b"probe", b"x", 1, -1))
    case("bpf MAP_CREATE", lambda: syscall(NR["bpf"], 0, struct.pack("=IIII", 2, 4, 4, 1) + bytes(112), 128))
    case("bpf PROG_LOAD", lambda: syscall(NR["bpf"], 5, bytes(128), 128))
    case("perf_event_open", lambda: syscall(
        NR["perf_event_open"], struct.pack("=IIQ", 1, 112, 0) + bytes(96), 0, -1, -1, 0))
    case("userfaultfd", lambda: syscall(NR["userfaultfd"], 0))
    case("userfaultfd USER_MODE_ONLY", lambda: syscall(NR["userfaultfd"], 1))
    case("io_uring_setup", lambda: syscall(NR["io_uring_setup"], 1, ctypes.create_string_buffer(120)))
    case("memfd_secret", lambda: syscall(NR["memfd_secret"], 0))
    case("fanotify_init", lambda: syscall(NR["fanotify_init"], 0, 0))
    case("quotactl Q_SYNC", lambda: syscall(NR["quotactl"], 0x80000100, 0, 0, 0))
    case("syslog size", lambda: syscall(NR["syslog"], 10, 0, 0))
    case("lookup_dcookie", syscall, NR["lookup_dcookie"], 0, 0, BUFFER, 10)
    case("open_by_handle_at", open_by_handle)
    case("kcmp self", lambda: syscall(NR["kcmp"], os.getpid(), os.getpid(), 0, 0, 0))
    case("pidfd_getfd self", lambda: syscall(
        NR["pidfd_getfd"], libc.syscall(NR["pidfd_open"], os.getpid(), 0), 0, 0))
    case("ptrace ATTACH a child", ptrace_child)
    case("ptrace SEIZE pid 1", lambda: syscall(NR["ptrace"], 0x4206, 1, 0, 0))       # ATTACH would stop it
    case("process_vm_readv self", lambda: syscall(NR["process_vm_readv"], os.getpid(), BUFFER, 0, BUFFER, 0, 0))
    case("get_mempolicy", lambda: syscall(NR["get_mempolicy"], 0, 0, 0, 0, 0))
    case("seccomp STRICT in a child", lambda: (
        None if syscall(NR["seccomp"], 2, 0, struct.pack("=I", 0x7FFF0000)) else ""))
    case("prctl SET_NO_NEW_PRIVS", lambda: syscall(NR["prctl"], 38, 1, 0, 0, 0))
    case("prctl SET_MM", lambda: syscall(NR["prctl"], 35, 6, 0, 0, 0))
    if ARCH == "x86_64":
        for name, number in {"getpid": 39, "mount": 165, "socket": 41, "ptrace x32": 521, "execve x32": 520,
                             "unshare": 272, "kexec_load x32": 528, "io_uring_setup": 425}.items():
            case(f"x32 {name}", syscall, 0x40000000 | number, *[-1] * 6)
        for name, number in {"getpid": 20, "mount": 21, "umount": 22, "unshare": 310, "ptrace": 26, "reboot": 88,
                             "socketcall": 102, "bpf": 357, "keyctl": 288, "clone3": 435, "io_uring_setup": 425,
                             "socket": 359, "personality": 136, "stime": 25}.items():
            case(f"int80 {name}", int80, number)
        case("int80 socket VSOCK", lambda: int80(359, 40))


def join_namespace(kind, flag):
    return syscall(NR["setns"], os.open(f"/proc/self/ns/{kind}", os.O_RDONLY), flag)


def open_by_handle():
    """The 'shocker' exploit: a file by its inode number, past every path."""
    handle, mount = ctypes.create_string_buffer(struct.pack("=Ii", 128, 0) + bytes(128)), ctypes.c_int()
    answer = syscall(NR["name_to_handle_at"], -100, b"/etc/passwd", handle, ctypes.byref(mount), 0)
    if answer != "ok":
        return "name_to_handle_at: " + answer
    return syscall(NR["open_by_handle_at"], os.open("/", os.O_RDONLY), handle, 0)


def ptrace_child():
    child = os.fork()
    if child == 0:
        time.sleep(2)
        os._exit(0)
    answer = syscall(NR["ptrace"], 16, child, 0, 0)      # PTRACE_ATTACH
    os.kill(child, signal.SIGKILL)
    return answer


# ---------------------------------------------------------------- the process

def read(path, size=1 << 20):
    with open(path, "rb", buffering=0) as file:
        return file.read(size).decode(errors="replace")


def words_of(path):
    return " ".join(read(path).split())


def clean(text):
    """Without what is random."""
    text = re.sub(r"[0-9a-f]{32,}", "<ID>", text)
    text = re.sub(rf"\b{re.escape(HOSTNAME)}\b", "<HOSTNAME>", text)
    text = re.sub(r"\b[0-9a-f]{12}\b", "<ID>", text)
    return re.sub(r"(pipe|socket|anon_inode|mnt|net|uts|ipc|pid|cgroup|user|time):\[\d+\]", r"\1:[<N>]", text)


HOSTNAME = os.uname().nodename
STATUS = [
    "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "Seccomp_filters",
    "Uid", "Gid", "Groups", "SigBlk", "SigIgn", "SigPnd", "ShdPnd", "NSpid", "Umask",
    "Cpus_allowed_list", "Mems_allowed_list", "Speculation_Store_Bypass", "THP_enabled",
]


def process():
    for kind in sorted(os.listdir("/proc/self/ns")):
        raw[f"ns.{kind}"] = os.readlink(f"/proc/self/ns/{kind}")
    status = dict(line.split(":\t", 1) for line in read("/proc/self/status").splitlines())
    for key in STATUS:
        compare[f"status.{key}"] = " ".join(status.get(key, "").split())
    # 32 and 33 are the C library's own; its posix_spawn(3), by which Python 3.13 starts mocker, lets them be ignored.
    compare["status.SigIgn"] = f"{int(status['SigIgn'], 16) & ~0x180000000:016x}"
    compare["pids"] = [int(pid) for pid in os.listdir("/proc") if pid.isdigit()]
    compare["pid"], compare["ppid"] = os.getpid(), os.getppid()
    compare["sid"], compare["pgrp"] = os.getsid(0), os.getpgrp()
    for name in ("/dev/tty", "/dev/console"):
        compare[f"open {name}"] = attempt(open_and_close, name, os.O_RDWR | os.O_NOCTTY, new_session=False)
    compare["controlling terminal"] = read("/proc/self/stat").rpartition(")")[2].split()[4]
    for descriptor in sorted(map(int, os.listdir("/proc/self/fd"))):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:
            continue        # the one that listed them
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        compare[f"fd.{descriptor}"] = f"{clean(target)} {flags:#o}"
        if os.isatty(descriptor):
            size = struct.unpack("4H", fcntl.ioctl(descriptor, 0x5413, bytes(8)))[:2]
            compare[f"fd.{descriptor}.tty"] = f"{os.ttyname(descriptor)} size {size}"
            owner = os.fstat(descriptor)
            compare[f"fd.{descriptor}.owner"] = f"{owner.st_uid}:{owner.st_gid} {owner.st_mode:o}"
    for name in sorted(name for name in dir(resource) if name.startswith("RLIMIT_") and name != "RLIMIT_OFILE"):
        compare[f"rlimit.{name[7:].lower()}"] = list(resource.getrlimit(getattr(resource, name)))
    for name in ("oom_score_adj", "loginuid", "sessionid", "coredump_filter", "timerslack_ns", "personality",
                 "setgroups", "uid_map", "gid_map", "attr/current"):
        compare[f"self.{name}"] = attempt(lambda name=name: words_of(f"/proc/self/{name}") or "empty")
    compare["nice"] = os.getpriority(os.PRIO_PROCESS, 0)
    compare["scheduler"] = os.sched_getscheduler(0)
    compare["umask"] = status.get("Umask")
    compare["cwd"] = os.getcwd()
    compare["root"] = [os.stat("/").st_uid, os.stat("/").st_gid, oct(os.stat("/").st_mode)]
    arguments = read("/proc/self/cmdline").split("\0")[:-1]
    compare["argv"] = [argument if len(argument) < 200 else "<PROBE>" for argument in arguments]
    compare["comm"] = read("/proc/self/comm").strip()
    environment = dict(entry.split("=", 1) for entry in read("/proc/self/environ").split("\0") if "=" in entry)
    compare["env.order"] = list(environment)
    for key, value in environment.items():
        compare[f"env.{key}"] = value.replace(HOSTNAME, "<HOSTNAME>")
    raw["hostname"], raw["domainname"] = HOSTNAME, read("/proc/sys/kernel/domainname").strip()
    compare["hostname"] = "12 hexadecimal digits" if re.fullmatch("[0-9a-f]{12}", HOSTNAME) else HOSTNAME
    compare["domainname"] = raw["domainname"]


# ---------------------------------------------------------------- what is mounted, and what can be touched

def mount_table():
    """(target, root, options, fields, type, source, super options), in order."""
    for line in read("/proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        _, _, _, root, target, options, *fields = left.split(" ")
        yield target, root, options, fields, *right.split(" ", 2)


def mounts():
    order = []
    for target, root, options, fields, kind, source, extra in mount_table():
        name = target
        while f"mount.{name}" in compare:
            name += " (again)"
        order.append(name)
        raw[f"mount.{name}"] = f"{root} {source} {extra}"
        if kind == "overlay":
            extra = ",".join(option for option in extra.split(",") if not re.match("(lower|upper|work)dir", option))
        compare[f"mount.{name}"] = f"{kind} {source} {options} | {extra}"
        compare[f"mount.{name}.propagation"] = re.sub(r"\d+", "<N>", " ".join(fields)) or "private"
        if kind not in ("ext4", "xfs", "btrfs", "overlay"):
            compare[f"mount.{name}.root"] = clean(root)
        if target != "/":
            compare[f"mount.{name}.writable"] = attempt(access, target, os.W_OK)
    compare["mount order"] = order


def open_and_close(path, flags):
    os.close(os.open(path, flags))


def access(path, mode):
    """access(2) tries without doing, and says EROFS where only the mount forbids it."""
    return None if libc.access(path.encode(), mode) == 0 else name_of(ctypes.get_errno())


def describe(path):
    status = os.lstat(path)
    kind = {stat.S_IFCHR: "char", stat.S_IFBLK: "block", stat.S_IFDIR: "directory", stat.S_IFLNK: "link",
            stat.S_IFREG: "file", stat.S_IFIFO: "fifo", stat.S_IFSOCK: "socket"}[stat.S_IFMT(status.st_mode)]
    text = f"{kind} {stat.S_IMODE(status.st_mode):04o} {status.st_uid}:{status.st_gid}"
    if kind in ("char", "block"):
        text += f" {os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return text + (" -> " + clean(os.readlink(path)) if kind == "link" else "")


def devices():
    for folder, folders, files in os.walk("/dev"):
        for path in [os.path.join(folder, name) for name in folders + files]:
            if folder.startswith(("/dev/cpu/", "/dev/snd", "/dev/disk")):
                continue
            compare[f"dev.{path[5:]}"] = describe(path)
    compare["dev"] = describe("/dev")
    for name in ("null", "zero", "full", "random", "urandom", "tty", "ptmx", "console", "fuse", "kmsg", "mem",
                 "vda", "sda", "loop0", "net/tun"):
        if os.path.exists("/dev/" + name):
            for word, flags in ("read", os.O_RDONLY), ("write", os.O_WRONLY):
                compare[f"dev.{name}.{word}"] = attempt(
                    open_and_close, "/dev/" + name, flags | os.O_NONBLOCK | os.O_NOCTTY, new_session=name != "tty")
    for name, *node in (
        ("disk", stat.S_IFBLK, 254, 0), ("mem", stat.S_IFCHR, 1, 1), ("null", stat.S_IFCHR, 1, 3),
        ("kmsg", stat.S_IFCHR, 1, 11), ("fuse", stat.S_IFCHR, 10, 229), ("tun", stat.S_IFCHR, 10, 200),
        ("loop-control", stat.S_IFCHR, 10, 237), ("loop0", stat.S_IFBLK, 7, 0), ("whiteout", stat.S_IFCHR, 0, 0),
    ):
        for folder in ("/tmp", "/dev", "/dev/shm"):
            compare[f"mknod {folder}/{name}"] = attempt(make_node, f"{folder}/probe-{name}", *node)
    compare["openpty"] = attempt(lambda: os.ttyname(os.openpty()[1]))


def make_node(path, kind, major, minor):
    os.mknod(path, kind | 0o600, os.makedev(major, minor))
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        return "made and opened"
    except OSError as error:
        return "made, open: " + name_of(error.errno)
    finally:
        os.unlink(path)


SENSITIVE = [
    "/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/key-users", "/proc/latency_stats",
    "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/proc/interrupts",
    "/proc/kmsg", "/proc/kallsyms", "/proc/kpagecount", "/proc/kpageflags", "/proc/kpagecgroup",
    "/proc/slabinfo", "/proc/vmallocinfo", "/proc/iomem", "/proc/ioports", "/proc/modules", "/proc/mtrr",
    "/proc/config.gz", "/proc/cmdline", "/proc/swaps", "/proc/sysrq-trigger", "/proc/bus", "/proc/fs",
    "/proc/irq", "/proc/irq/default_smp_affinity", "/proc/sys", "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/hostname", "/proc/sys/kernel/domainname", "/proc/sys/kernel/modprobe",
    "/proc/sys/kernel/sysrq", "/proc/sys/kernel/shmmax", "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/fs/binfmt_misc", "/proc/sys/fs/mqueue/msg_max", "/proc/sys/vm/panic_on_oom",
    "/proc/sys/vm/drop_caches", "/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/core/somaxconn",
    "/proc/driver", "/proc/dynamic_debug", "/proc/pressure/memory", "/proc/1/mem", "/proc/1/environ",
    "/proc/1/root", "/proc/1/oom_score_adj", "/proc/self/mem", "/proc/self/exe", "/sys", "/sys/firmware",
    "/sys/firmware/acpi", "/sys/firmware/memmap", "/sys/kernel/debug", "/sys/kernel/tracing",
    "/sys/kernel/security", "/sys/kernel/uevent_helper", "/sys/kernel/mm/transparent_hugepage/enabled",
    "/sys/kernel/vmcoreinfo", "/sys/kernel/kexec_loaded", "/sys/power/state", "/sys/module", "/sys/bus",
    "/sys/block", "/sys/class/net", "/sys/class/net/lo/mtu", "/sys/fs/cgroup", "/sys/fs/bpf", "/sys/fs/pstore",
    "/sys/fs/fuse/connections", "/sys/fs/ext4", "/sys/devices/virtual/powercap",
    "/sys/devices/system/cpu/cpu0/online", "/sys/devices/system/cpu/cpu0/thermal_throttle",
    "/sys/devices/system/memory", "/sys/hypervisor",
]


def kernel_files():
    """The files of /proc and /sys that tell, or do, too much; and all that can be written at all."""
    for path in SENSITIVE:
        if not os.path.lexists(path):
            compare[f"kernel.{path}"] = "absent"
        elif os.path.isdir(path):
            inside = attempt(lambda path=path: "has entries" if os.listdir(path) else "empty")
            compare[f"kernel.{path}"] = f"{describe(path)}; {inside}; write {attempt(access, path, os.W_OK)}"
        else:
            compare[f"kernel.{path}"] = "; ".join([
                describe(path), "read " + ("not tried" if path == "/proc/kmsg" else attempt(taste, path)),
                "write " + attempt(open_and_close, path, os.O_WRONLY | os.O_NONBLOCK)])
    for top in ("/proc", "/sys"):
        found = {}
        for folder, folders, files in os.walk(top):
            if folder == "/proc":
                folders[:] = [name for name in folders if not name.isdigit() and name not in ("self", "thread-self")]
            if folder.startswith("/sys/fs/cgroup"):
                folders[:] = []
                continue
            for path in [os.path.join(folder, name) for name in files] + [folder]:
                if not os.path.islink(path) and libc.access(path.encode(), os.W_OK) == 0:
                    single = top == "/proc" and not path.startswith("/proc/sys/")
                    key = path if single else "/".join(path.split("/")[:4])
                    found[key] = found.get(key, 0) + 1
        compare[f"writable in {top}"] = found


def taste(path):
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if path.endswith("/mem"):
        return "opens"
    return "has data" if os.read(descriptor, 64) else "empty"


def cgroups():
    raw["cgroup"] = read("/proc/self/cgroup")
    lines = sorted(re.sub(r"^\d+", "N", line) for line in raw["cgroup"].splitlines())
    compare["cgroup"] = [clean(line) for line in lines]
    for top in sorted({target for target, *_ in mount_table() if target.startswith("/sys/fs/cgroup")}):
        kinds = [mount[4] for mount in mount_table() if mount[0] == top]
        if kinds[-1] in ("cgroup", "cgroup2"):
            files = [os.path.join(top, name) for name in sorted(os.listdir(top))]
            compare[f"cgroup.{top}.writable"] = [path for path in files if libc.access(path.encode(), os.W_OK) == 0]
            compare[f"cgroup.{top}.mkdir"] = attempt(make_and_remove, top + "/probe")
            compare[f"cgroup.{top}.folders"] = len([path for path in files if os.path.isdir(path)])
            for name in ("tasks", "cgroup.procs", "release_agent", "notify_on_release", "devices.allow"):
                if os.path.exists(f"{top}/{name}"):
                    compare[f"cgroup.{top}/{name}.write"] = attempt(open_and_close, f"{top}/{name}", os.O_WRONLY)
    compare["cgroup.folder"] = describe("/sys/fs/cgroup") + " " + " ".join(
        clean(describe("/sys/fs/cgroup/" + name)) + " " + name for name in sorted(os.listdir("/sys/fs/cgroup"))
        if os.path.islink("/sys/fs/cgroup/" + name))


def make_and_remove(folder):
    os.mkdir(folder)
    os.rmdir(folder)


# ---------------------------------------------------------------- the network

def rename_and_back(path):
    os.rename(path, path + "-probe")
    os.rename(path + "-probe", path)


SYSCTLS = [
    "net/ipv4/ping_group_range", "net/ipv4/ip_unprivileged_port_start", "net/ipv4/ip_forward",
    "net/ipv4/conf/all/forwarding", "net/ipv6/conf/all/disable_ipv6", "net/ipv6/conf/default/disable_ipv6",
    "net/ipv4/ip_local_port_range", "net/core/somaxconn", "kernel/shmmax", "kernel/shmall", "kernel/msgmax",
    "kernel/sem", "fs/mqueue/msg_max", "kernel/keys/maxkeys", "user/max_user_namespaces",
]


def network():
    for name in ("hosts", "hostname", "resolv.conf"):
        path = "/etc/" + name
        if os.path.lexists(path):
            raw[path] = read(path)
            text = re.sub(r"(?m)^\d+\.\d+\.\d+\.\d+(\s+<HOSTNAME>)", r"<ADDRESS>\1", clean(raw[path]))
            compare[path] = text
            compare[path + ".is"] = describe(path)
            compare[path + ".write"] = attempt(access, path, os.W_OK)
            compare[path + ".unlink"] = attempt(rename_and_back, path)
    compare["interfaces"] = sorted(name for _, name in socket.if_nameindex())
    probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for name in compare["interfaces"]:
        request = struct.pack("16s16x", name.encode())
        values = {}
        for word, code in ("flags", 0x8913), ("mtu", 0x8921), ("txqlen", 0x8942):
            values[word] = struct.unpack("16si", fcntl.ioctl(probe, code, request)[:20])[1]
        values["flags"] = hex(values["flags"] & 0xFFFF)
        compare[f"interface.{name}"] = values
        for word, code in ("address", 0x8915), ("netmask", 0x891B), ("broadcast", 0x8919), ("mac", 0x8927):
            try:
                answer = fcntl.ioctl(probe, code, request)
                said = answer[18:24].hex(":") if word == "mac" else socket.inet_ntoa(answer[20:24])
                raw[f"interface.{name}.{word}"] = said
            except OSError as error:
                raw[f"interface.{name}.{word}"] = name_of(error.errno)
    probe.close()
    raw["routes"] = [line.split()[:8] for line in read("/proc/net/route").splitlines()[1:]]
    compare["routes"] = [
        ("default" if route[1] == "00000000" else "network") + " flags " + route[3] for route in raw["routes"]]
    raw["ipv6"] = compare["ipv6 addresses"] = "none"
    if os.path.exists("/proc/net/if_inet6"):
        raw["ipv6"] = read("/proc/net/if_inet6").splitlines()
        compare["ipv6 addresses"] = sorted(f"{line.split()[5]} scope {line.split()[3]}" for line in raw["ipv6"])
    for name in SYSCTLS:
        compare[f"sysctl.{name}"] = attempt(words_of, f"/proc/sys/{name}")
    compare["unix abstract sockets"] = len(read("/proc/net/unix").splitlines()) - 1


# ---------------------------------------------------------------- what it may do

def actions():
    """What people try, for better or worse. Each in a child, each undone by its end."""
    case("do mount tmpfs", lambda: (
        "not tried" if privileged() else syscall(NR["mount"], b"probe", b"/tmp", b"tmpfs", 0, 0)))
    case("do chroot", lambda: os.chroot("/tmp"))
    case("do sethostname", lambda: socket.sethostname(HOSTNAME))
    case("do set the clock", lambda: time.clock_settime(time.CLOCK_REALTIME, -1))
    case("do nice -5", lambda: os.setpriority(os.PRIO_PROCESS, 0, -5))
    case("do nice +5", lambda: os.setpriority(os.PRIO_PROCESS, 0, 5))
    case("do SCHED_FIFO", lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)))
    case("do ioprio realtime", lambda: syscall(NR["ioprio_set"], 1, 0, 1 << 13))
    case("do raise RLIMIT_CORE", lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)) or syscall(
        NR["prlimit64"], 0, resource.RLIMIT_CORE, struct.pack("QQ", 1, 1), 0))
    case("do mlock", lambda: syscall(NR["mlock"], BUFFER, 4096))
    case("do setuid 12345", lambda: os.setuid(12345))
    case("do setgroups", lambda: os.setgroups([1, 2, 3]))
    case("do chown", lambda: on_file(lambda path: os.chown(path, 12345, 12345)))
    case("do setuid bit of another's file", lambda: on_file(
        lambda path: os.chown(path, 12345, 12345) or os.chmod(path, 0o6755)))
    case("do file capability", lambda: on_file(lambda path: os.setxattr(
        path, "security.capability", struct.pack("<5I", 0x2000001, 1 << 13, 0, 0, 0))))
    case("do trusted xattr", lambda: on_file(lambda path: os.setxattr(path, "trusted.probe", b"x")))
    case("do user xattr", lambda: on_file(lambda path: os.setxattr(path, "user.probe", b"x")))
    case("do immutable", lambda: on_file(immutable))
    case("do bind port 80", lambda: socket.socket().bind(("127.0.0.1", 80)))
    case("do bind port 8080", lambda: socket.socket().bind(("127.0.0.1", 8080)))
    case("do SO_RCVBUFFORCE", lambda: socket.socket().setsockopt(socket.SOL_SOCKET, 33, 1 << 20))
    case("do lo down and up", lambda: set_link("lo"))
    case("do write audit", lambda: socket.socket(16, socket.SOCK_RAW, 9).bind((0, 0)))
    case("do oom_score_adj -1000", lambda: write("/proc/self/oom_score_adj", "-1000"))
    case("do oom_score_adj 500", lambda: write("/proc/self/oom_score_adj", "500"))
    case("do write /proc/sys/kernel/hostname", open_and_close, "/proc/sys/kernel/hostname", os.O_WRONLY)
    case("do kill pid 1 with 0", lambda: os.kill(1, 0))
    case("do read another's file", lambda: on_file(
        lambda path: os.chmod(path, 0) or os.close(os.open(path, os.O_RDONLY))))
    case("do write /", lambda: on_file(lambda path: None, "/probe-file"))
    case("do write /tmp", lambda: on_file(lambda path: None, "/tmp/probe-file"))
    case("do exec from /dev/shm", lambda: execute("/dev/shm/probe-file"))
    case("do exec from /tmp", lambda: execute("/tmp/probe-file"))
    case("do chroot breakout", breakout)


def privileged():
    return libc.prctl(23, 21, 0, 0, 0) == 1        # PR_CAPBSET_READ, CAP_SYS_ADMIN


def write(path, text):
    descriptor = os.open(path, os.O_WRONLY)
    os.write(descriptor, text.encode())
    os.close(descriptor)


def on_file(action, path="/tmp/probe-file"):
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        return action(path)
    finally:
        os.unlink(path)


def immutable(path):
    descriptor = os.open(path, os.O_RDONLY)
    flags = fcntl.ioctl(descriptor, 0x80086601, bytes(8))       # FS_IOC_GETFLAGS
    fcntl.ioctl(descriptor, 0x40086602, struct.pack("l", struct.unpack("l", flags)[0] | 0x10))
    fcntl.ioctl(descriptor, 0x40086602, flags)                  # or it could not be deleted


def execute(path):
    def run(path):
        write(path, "#!/bin/true\n")
        os.chmod(path, 0o755)
        child = os.fork()
        if child == 0:
            try:
                os.execv(path, [path])
            except OSError as error:
                os._exit(error.errno)
        code = os.WEXITSTATUS(os.waitpid(child, 0)[1])
        return name_of(code) if code else None
    return on_file(run, path)


def set_link(name):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        flags = fcntl.ioctl(control, 0x8913, struct.pack("16s16x", name.encode()))
        fcntl.ioctl(control, 0x8914, flags)         # the same flags again


def breakout():
    """The classic: chroot once more with the old working directory outside, then climb."""
    os.mkdir("/tmp/probe-jail")
    try:
        before = os.stat("/").st_ino, os.stat("/").st_dev
        here = os.open("/", os.O_RDONLY)
        os.chroot("/tmp/probe-jail")
        os.fchdir(here)
        for _ in range(64):
            os.chdir("..")
        after = os.stat(".").st_ino, os.stat(".").st_dev
        os.chroot(".")
        return "still inside" if before == after else "OUTSIDE"
    finally:
        os.rmdir("/tmp/probe-jail")


def difference(one, other):
    """The lines that differ; True if there are any."""
    one, other = (json.loads(read(path))["compare"] for path in (one, other))
    keys = [key for key in {**one, **other} if one.get(key, "-") != other.get(key, "-")]
    for key in keys:
        print(f"{key}\n    {one.get(key, '-')}\n    {other.get(key, '-')}")
    return bool(keys)


def main(arguments):
    if arguments[:1] == ["--diff"]:
        sys.exit(difference(*arguments[1:3]))
    if arguments[:1] == ["--ns"]:
        kinds = sorted(os.listdir("/proc/self/ns"))
        print(json.dumps({f"ns.{kind}": os.readlink(f"/proc/self/ns/{kind}") for kind in kinds}))
        return
    sections = (process, mounts, devices, kernel_files, cgroups, network, try_syscalls, try_arguments, actions)
    for section in [section for section in sections if not arguments or section.__name__ in arguments]:
        try:
            section()
        except Exception as error:      # a part that can't be seen is a difference too, and not the end
            compare[f"{section.__name__} failed"] = clean(repr(error))
    json.dump({"compare": compare, "raw": raw}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main(sys.argv[1:])
