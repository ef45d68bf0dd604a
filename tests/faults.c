/* A fault-injecting file layer, loaded with LD_PRELOAD: it counts the calls that change files below one folder, whoever makes
   them (Python, torch, safetensors, pyarrow), and at one of them injects a fault. faults.py compiles and drives it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, FULL, FAULT, KILL, TORN, TERM, STOP, READ_ONLY };

/* Lies in memory that faults.py shares with the process it watches; same layout as faults.Record. */
struct record {
    long pid, action, at, count;
    char folder[1024];
    char match[256]; /* only calls on paths that hold this text count */
    char where[1024]; /* the call that got the fault */
};
static struct record *record;

void fault_use(struct record *shared) { record = shared; }

#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

static int armed(void) { return record && record->pid == getpid(); }

static int below(const char *path) {
    size_t length = strlen(record->folder);
    return !strncmp(path, record->folder, length) && (path[length] == '/' || !path[length]);
}

/* Whether a path, relative to a directory descriptor, lies in the folder; full is its absolute form. */
static int watched_at(int dir, const char *path, char *full) {
    char base[PATH_MAX] = "", link[64];
    if (!armed() || !path) return 0;
    if (path[0] != '/') {
        if (dir == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) return 0;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
            ssize_t n = readlink(link, base, sizeof base - 1);
            if (n <= 0) return 0;
            base[n] = 0;
        }
        snprintf(full, PATH_MAX, "%s/%s", base, path);
    } else
        snprintf(full, PATH_MAX, "%s", path);
    return below(full);
}

static int watched_fd(int fd, char *full) {
    char link[64];
    if (!armed()) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, full, PATH_MAX - 1);
    if (n <= 0) return 0;
    full[n] = 0;
    return below(full);
}

/* Count a call; returns 0 or the error that it must give. grows: the call needs space on the disk. */
static int injected(const char *call, const char *path, int grows) {
    if (!strstr(path, record->match) && !(record->at > 0 && record->count >= record->at)) return 0;
    long number = __sync_add_and_fetch(&record->count, 1);
    if (number == record->at) snprintf(record->where, sizeof record->where, "%s %s", call, path);
    if (record->at <= 0 || number < record->at) return 0;
    switch (record->action) {
    case FULL: return grows ? ENOSPC : 0;
    case READ_ONLY: return EROFS;
    case FAULT: return number == record->at ? EIO : 0;
    case KILL:
    case TORN: kill(getpid(), SIGKILL); return 0;
    case TERM: if (number == record->at) kill(getpid(), SIGTERM); return 0;
    case STOP: if (number == record->at) kill(getpid(), SIGSTOP); return 0;
    }
    return 0;
}

/* Before a write that will be torn or run out of space, half of it reaches the disk. */
static int halved(const char *path) {
    return strstr(path, record->match) && record->count + 1 == record->at && (record->action == TORN || record->action == FULL);
}

#define INJECT(watched, call, path, grows, failure)                                                                  \
    char full[PATH_MAX];                                                                                             \
    if (watched) {                                                                                                   \
        int error = injected(call, full, grows);                                                                     \
        if (error) { errno = error; return failure; }                                                                \
    }

ssize_t write(int fd, const void *bytes, size_t size) {
    REAL(write);
    char full[PATH_MAX];
    if (watched_fd(fd, full)) {
        if (halved(full) && size > 1) { ssize_t ignored = real(fd, bytes, size / 2); (void)ignored; }
        int error = injected("write", full, 1);
        if (error) { errno = error; return -1; }
    }
    return real(fd, bytes, size);
}
ssize_t pwrite(int fd, const void *bytes, size_t size, off_t offset) {
    REAL(pwrite);
    INJECT(watched_fd(fd, full), "pwrite", full, 1, -1)
    return real(fd, bytes, size, offset);
}
ssize_t pwrite64(int fd, const void *bytes, size_t size, off64_t offset) {
    REAL(pwrite64);
    INJECT(watched_fd(fd, full), "pwrite", full, 1, -1)
    return real(fd, bytes, size, offset);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    char full[PATH_MAX];
    if (watched_fd(fd, full)) {
        if (halved(full) && count > 0) { ssize_t ignored = real(fd, parts, 1); (void)ignored; }
        int error = injected("writev", full, 1);
        if (error) { errno = error; return -1; }
    }
    return real(fd, parts, count);
}
ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
    ssize_t (*real)(int, int, off_t *, size_t) = (ssize_t(*)(int, int, off_t *, size_t))dlsym(RTLD_NEXT, "sendfile");
    INJECT(watched_fd(out, full), "sendfile", full, 1, -1)
    return real(out, in, offset, size);
}
ssize_t sendfile64(int out, int in, off64_t *offset, size_t size) {
    ssize_t (*real)(int, int, off64_t *, size_t) =
        (ssize_t(*)(int, int, off64_t *, size_t))dlsym(RTLD_NEXT, "sendfile64");
    INJECT(watched_fd(out, full), "sendfile", full, 1, -1)
    return real(out, in, offset, size);
}
ssize_t copy_file_range(int in, off64_t *in_at, int out, off64_t *out_at, size_t size, unsigned flags) {
    REAL(copy_file_range);
    INJECT(watched_fd(out, full), "copy_file_range", full, 1, -1)
    return real(in, in_at, out, out_at, size, flags);
}
int ftruncate(int fd, off_t size) {
    REAL(ftruncate);
    INJECT(watched_fd(fd, full), "ftruncate", full, 1, -1)
    return real(fd, size);
}
int fsync(int fd) {
    REAL(fsync);
    INJECT(watched_fd(fd, full), "fsync", full, 0, -1)
    return real(fd);
}

/* Opening counts where it makes or empties a file; on a full disk an empty file of an old name can still be had. */
static int opened(int dir, const char *path, int flags) {
    char full[PATH_MAX];
    if (!(flags & (O_CREAT | O_TRUNC)) && (flags & O_TMPFILE) != O_TMPFILE) return 0;
    if (!watched_at(dir, path, full)) return 0;
    return injected("open", full, access(full, F_OK) != 0);
}
#define OPEN(name)                                                                                                   \
    int name(const char *path, int flags, ...) {                                                                     \
        int (*real)(const char *, int, ...) = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name);              \
        va_list rest;                                                                                                \
        va_start(rest, flags);                                                                                       \
        mode_t mode = va_arg(rest, mode_t);                                                                          \
        va_end(rest);                                                                                                \
        int error = opened(AT_FDCWD, path, flags);                                                                   \
        if (error) { errno = error; return -1; }                                                                     \
        return real(path, flags, mode);                                                                              \
    }
#define OPENAT(name)                                                                                                 \
    int name(int dir, const char *path, int flags, ...) {                                                            \
        int (*real)(int, const char *, int, ...) = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, #name);    \
        va_list rest;                                                                                                \
        va_start(rest, flags);                                                                                       \
        mode_t mode = va_arg(rest, mode_t);                                                                          \
        va_end(rest);                                                                                                \
        int error = opened(dir, path, flags);                                                                        \
        if (error) { errno = error; return -1; }                                                                     \
        return real(dir, path, flags, mode);                                                                         \
    }
#define FOPEN(name)                                                                                                  \
    FILE *name(const char *path, const char *mode) {                                                                 \
        FILE *(*real)(const char *, const char *) = (FILE * (*)(const char *, const char *)) dlsym(RTLD_NEXT, #name);\
        int error = *mode == 'r' ? 0 : opened(AT_FDCWD, path, O_CREAT);                                              \
        if (error) { errno = error; return NULL; }                                                                   \
        return real(path, mode);                                                                                     \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
FOPEN(fopen)
FOPEN(fopen64)

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    INJECT(watched_at(AT_FDCWD, path, full) && access(full, F_OK), "mkdir", full, 1, -1)
    return real(path, mode);
}
int rename(const char *from, const char *to) {
    REAL(rename);
    INJECT(watched_at(AT_FDCWD, to, full), "rename to", full, 0, -1)
    return real(from, to);
}
int renameat(int from_dir, const char *from, int to_dir, const char *to) {
    REAL(renameat);
    INJECT(watched_at(to_dir, to, full), "rename to", full, 0, -1)
    return real(from_dir, from, to_dir, to);
}
int link(const char *from, const char *to) {
    REAL(link);
    INJECT(watched_at(AT_FDCWD, to, full), "link", full, 1, -1)
    return real(from, to);
}
int symlink(const char *target, const char *path) {
    REAL(symlink);
    INJECT(watched_at(AT_FDCWD, path, full), "symlink", full, 1, -1)
    return real(target, path);
}
int unlink(const char *path) {
    REAL(unlink);
    INJECT(watched_at(AT_FDCWD, path, full) && !access(full, F_OK), "unlink", full, 0, -1)
    return real(path);
}
int unlinkat(int dir, const char *path, int flags) {
    REAL(unlinkat);
    INJECT(watched_at(dir, path, full), "unlink", full, 0, -1)
    return real(dir, path, flags);
}
int rmdir(const char *path) {
    REAL(rmdir);
    INJECT(watched_at(AT_FDCWD, path, full), "rmdir", full, 0, -1)
    return real(path);
}
