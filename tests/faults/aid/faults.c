/* Faults of a file system, put between a program and libc: LD_PRELOAD of a library made of this.
 *
 * Once `fault_arm` was called, operations on files below a folder are counted, those of chosen kinds only, and the n-th
 * is what the process dies of or what fails. Everything that writes goes through here: Python, pyarrow, safetensors.
 * Descriptors count by how they were opened; what is mapped into memory or opened before is not seen.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { CREATE = 1, WRITE = 2, SYNC = 4, NAME = 8, REMOVE = 16, MKDIR = 32, READ = 64 };
enum { COUNT, KILL, TEAR, FAIL_ONCE, FAIL_ON };

#define MAX_FD 65536
static char folder[PATH_MAX];
static int armed, how, error, kinds, log_fd = -1;
static long nth;
static atomic_long seen;
static unsigned char watched[MAX_FD];

void fault_arm(const char *below, long n, int what, int number, int of_kinds, const char *log) {
    snprintf(folder, sizeof folder, "%s", below);
    nth = n, how = what, error = number, kinds = of_kinds, seen = 0;
    log_fd = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    armed = 1;
}

static const char *of_fd(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    path[n < 0 ? 0 : n] = 0;
    return path;
}

static const char *full(int dir, const char *name, char *path) {
    char from[PATH_MAX];
    if (name[0] == '/') return name;
    if (dir != AT_FDCWD) of_fd(dir, from);
    else if (syscall(SYS_getcwd, from, sizeof from) < 0) from[0] = 0;
    snprintf(path, PATH_MAX, "%.*s/%.*s", PATH_MAX / 2, from, PATH_MAX / 2 - 2, name);
    return path;
}

static int below(const char *path) {
    size_t n = strlen(folder);
    return armed && !strncmp(path, folder, n) && (path[n] == '/' || path[n] == 0);
}

enum { GO_ON, FAIL, HALF };

/* What is to happen to this operation. */
static int fate(int kind, const char *operation, const char *path) {
    if (!(kind & kinds)) return GO_ON;
    long number = atomic_fetch_add(&seen, 1) + 1;
    int hit = how == FAIL_ON ? number >= nth : number == nth;
    if (how == COUNT || (hit && number == nth)) {
        char line[PATH_MAX + 64];
        int n = snprintf(line, sizeof line, "%d %s %s\n", kind, operation, path);
        if (syscall(SYS_write, log_fd, line, n) < 0) return GO_ON;
    }
    if (!hit || how == COUNT) return GO_ON;
    if (how == KILL || (how == TEAR && kind != WRITE)) syscall(SYS_kill, getpid(), SIGKILL);
    if (how == TEAR) return HALF;
    /* what fits on a full disk is written, and then no more of it */
    if (how == FAIL_ON && kind == WRITE && number == nth) return HALF;
    errno = error;
    return FAIL;
}

static void die_if_torn(void) {
    if (how == TEAR) syscall(SYS_kill, getpid(), SIGKILL);
}

#define NEXT(name) __typeof__(name) *next = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

static int opened(int dir, const char *name, int flags, mode_t mode) {
    char buffer[PATH_MAX];
    const char *path = full(dir, name, buffer);
    int is_below = below(path), writes = flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC);
    if (is_below && fate(writes ? CREATE : READ, writes ? "create" : "open", path) == FAIL) return -1;
    int fd = (int)syscall(SYS_openat, dir, name, flags, mode);
    if (fd >= 0 && fd < MAX_FD) watched[fd] = is_below;
    return fd;
}

#define OPEN(function)                                       \
    int function(const char *name, int flags, ...) {         \
        va_list rest;                                        \
        va_start(rest, flags);                               \
        mode_t mode = va_arg(rest, mode_t);                  \
        va_end(rest);                                        \
        return opened(AT_FDCWD, name, flags, mode);          \
    }
#define OPENAT(function)                                     \
    int function(int dir, const char *name, int flags, ...) { \
        va_list rest;                                        \
        va_start(rest, flags);                               \
        mode_t mode = va_arg(rest, mode_t);                  \
        va_end(rest);                                        \
        return opened(dir, name, flags, mode);               \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

int close(int fd) {
    if (fd >= 0 && fd < MAX_FD) watched[fd] = 0;
    return (int)syscall(SYS_close, fd);
}

static int is_watched(int fd) { return armed && fd >= 0 && fd < MAX_FD && watched[fd]; }

static int of_descriptor(int fd, int kind, const char *operation) {
    char path[PATH_MAX];
    return is_watched(fd) ? fate(kind, operation, of_fd(fd, path)) : GO_ON;
}

ssize_t write(int fd, const void *data, size_t size) {
    int what = of_descriptor(fd, WRITE, "write");
    if (what == FAIL) return -1;
    ssize_t done = syscall(SYS_write, fd, data, what == HALF ? size / 2 : size);
    if (what == HALF) die_if_torn();
    return done;
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    int what = of_descriptor(fd, WRITE, "write");
    if (what == FAIL) return -1;
    ssize_t done = syscall(SYS_writev, fd, parts, what == HALF ? (count + 1) / 2 : count);
    if (what == HALF) die_if_torn();
    return done;
}

#define PWRITE(function)                                                                  \
    ssize_t function(int fd, const void *data, size_t size, off64_t at) {                 \
        int what = of_descriptor(fd, WRITE, "write");                                     \
        if (what == FAIL) return -1;                                                      \
        ssize_t done = syscall(SYS_pwrite64, fd, data, what == HALF ? size / 2 : size, at); \
        if (what == HALF) die_if_torn();                                                  \
        return done;                                                                      \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

#define SENDFILE(function)                                                      \
    ssize_t function(int to, int from, off64_t *at, size_t size) {              \
        if (of_descriptor(to, WRITE, "write") == FAIL) return -1;               \
        return syscall(SYS_sendfile, to, from, at, size);                       \
    }
SENDFILE(sendfile)
SENDFILE(sendfile64)

ssize_t read(int fd, void *data, size_t size) {
    return of_descriptor(fd, READ, "read") == FAIL ? -1 : syscall(SYS_read, fd, data, size);
}

#define PREAD(function)                                                                                    \
    ssize_t function(int fd, void *data, size_t size, off64_t at) {                                        \
        return of_descriptor(fd, READ, "read") == FAIL ? -1 : syscall(SYS_pread64, fd, data, size, at);    \
    }
PREAD(pread)
PREAD(pread64)

int fsync(int fd) { return of_descriptor(fd, SYNC, "fsync") == FAIL ? -1 : (int)syscall(SYS_fsync, fd); }
int fdatasync(int fd) { return of_descriptor(fd, SYNC, "fsync") == FAIL ? -1 : (int)syscall(SYS_fdatasync, fd); }

static int named(int dir, const char *name, int kind, const char *operation) {
    char buffer[PATH_MAX];
    const char *path = full(dir, name, buffer);
    return below(path) && fate(kind, operation, path) == FAIL;
}

int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    return named(to, new, NAME, "rename") ? -1 : (int)syscall(SYS_renameat2, from, old, to, new, flags);
}
int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int from, const char *old, int to, const char *new) { return renameat2(from, old, to, new, 0); }

int linkat(int from, const char *old, int to, const char *new, int flags) {
    return named(to, new, NAME, "link") ? -1 : (int)syscall(SYS_linkat, from, old, to, new, flags);
}
int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }

int unlinkat(int dir, const char *name, int flags) {
    return named(dir, name, REMOVE, "remove") ? -1 : (int)syscall(SYS_unlinkat, dir, name, flags);
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }

int mkdirat(int dir, const char *name, mode_t mode) {
    return named(dir, name, MKDIR, "mkdir") ? -1 : (int)syscall(SYS_mkdirat, dir, name, mode);
}
int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

DIR *opendir(const char *name) {
    NEXT(opendir);
    return named(AT_FDCWD, name, READ, "list") ? NULL : next(name);
}
