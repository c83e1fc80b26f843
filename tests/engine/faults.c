/* Preloaded into a build by tests/engine/test_faults.py: one call of the C library's fails, whichever process makes it.
   FAULT_UNDER   only calls about files below this folder count
   FAULT_ERRNO   what a call fails with
   FAULT_COUNT   a file, shared by all processes, with two numbers of 8 bytes for each of KINDS: how many calls of the
                 kind have been made, and which of them fails (0: none) */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static const char *KINDS[] = {"open",   "read",  "write", "rename", "mkdir", "link",
                              "unlink", "fsync", "stat",  "utime",  "chmod"};
enum { N = sizeof KINDS / sizeof *KINDS };
static uint64_t (*count)[2];
static const char *under;
static int number;

__attribute__((constructor)) static void start(void) {
  const char *file = getenv("FAULT_COUNT"), *code = getenv("FAULT_ERRNO");
  under = getenv("FAULT_UNDER");
  if (!file || !code || !under) return;
  number = atoi(code);
  long descriptor = syscall(SYS_openat, AT_FDCWD, file, O_RDWR | O_CLOEXEC);
  if (descriptor < 0) return;
  void *map = mmap(0, 16 * N, PROT_READ | PROT_WRITE, MAP_SHARED, (int)descriptor, 0);
  syscall(SYS_close, descriptor);
  if (map != MAP_FAILED) count = map;
}

static int fails(const char *name, int folder, const char *path) {
  char here[4096], link[64];
  if (!count) return 0;
  if (!path || path[0] != '/') { /* a descriptor, or relative to one */
    snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
    long size = syscall(SYS_readlinkat, AT_FDCWD, link, here, sizeof here - 1);
    if (size < 0) return 0;
    here[size] = 0;
    path = here;
  }
  if (strncmp(path, under, strlen(under))) return 0;
  int kind = 0;
  while (strcmp(name, KINDS[kind])) kind++;
  if (__atomic_add_fetch(&count[kind][0], 1, __ATOMIC_SEQ_CST) != count[kind][1]) return 0;
  errno = number;
  return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRAP(kind, result, name, parameters, arguments, folder, path) \
  result name parameters { return fails(kind, folder, path) ? (result)-1 : REAL(name) arguments; }

#define OPEN(name, parameters, arguments, folder) \
  int name parameters { \
    va_list list; \
    va_start(list, flags); \
    int mode = va_arg(list, int); \
    va_end(list); \
    return fails("open", folder, path) ? -1 : REAL(name) arguments; \
  }
OPEN(open, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(openat, (int folder, const char *path, int flags, ...), (folder, path, flags, mode), folder)
OPEN(openat64, (int folder, const char *path, int flags, ...), (folder, path, flags, mode), folder)

WRAP("read", ssize_t, read, (int d, void *b, size_t n), (d, b, n), d, 0)
WRAP("read", ssize_t, pread64, (int d, void *b, size_t n, off64_t o), (d, b, n, o), d, 0)
WRAP("write", ssize_t, write, (int d, const void *b, size_t n), (d, b, n), d, 0)
WRAP("write", ssize_t, pwrite64, (int d, const void *b, size_t n, off64_t o), (d, b, n, o), d, 0)
WRAP("rename", int, rename, (const char *a, const char *b), (a, b), AT_FDCWD, a)
WRAP("rename", int, renameat, (int c, const char *a, int d, const char *b), (c, a, d, b), c, a)
WRAP("mkdir", int, mkdir, (const char *a, mode_t m), (a, m), AT_FDCWD, a)
WRAP("mkdir", int, mkdirat, (int d, const char *a, mode_t m), (d, a, m), d, a)
WRAP("link", int, link, (const char *a, const char *b), (a, b), AT_FDCWD, a)
WRAP("link", int, linkat, (int c, const char *a, int d, const char *b, int f), (c, a, d, b, f), c, a)
WRAP("unlink", int, unlink, (const char *a), (a), AT_FDCWD, a)
WRAP("unlink", int, unlinkat, (int d, const char *a, int f), (d, a, f), d, a)
WRAP("unlink", int, rmdir, (const char *a), (a), AT_FDCWD, a)
WRAP("fsync", int, fsync, (int d), (d), d, 0)
WRAP("stat", int, stat64, (const char *a, struct stat64 *s), (a, s), AT_FDCWD, a)
WRAP("stat", int, lstat64, (const char *a, struct stat64 *s), (a, s), AT_FDCWD, a)
WRAP("stat", int, stat, (const char *a, struct stat *s), (a, s), AT_FDCWD, a)
WRAP("stat", int, lstat, (const char *a, struct stat *s), (a, s), AT_FDCWD, a)
WRAP("utime", int, utimensat, (int d, const char *a, const struct timespec t[2], int f), (d, a, t, f), d, a)
WRAP("chmod", int, chmod, (const char *a, mode_t m), (a, m), AT_FDCWD, a)
