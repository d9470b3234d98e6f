// PID 1 of a guest whose disks are tested: it reports on the first disk itself, in words, one a sector from sector 64 on.
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <unistd.h>

#define SECTOR 512

static int disk = -1, reports;

static void report(const char *what, long value) {
    char sector[SECTOR] = {0};
    snprintf(sector, sizeof sector, "%s %ld\n", what, value);
    pwrite(disk, sector, SECTOR, (64 + reports++) * SECTOR);
}

int main(void) {
    char bytes[8 * SECTOR];
    uint64_t size = 0, range[2] = {16 * SECTOR, 8 * SECTOR}, zero[2] = {32 * SECTOR, 8 * SECTOR};
    int flag = -1, other;

    mkdir("/dev", 0755);
    mount("dev", "/dev", "devtmpfs", 0, "");
    disk = open("/dev/vda", O_RDWR);
    report("size", ioctl(disk, BLKGETSIZE64, &size) ? -errno : (long)size);
    // What the host wrote to sector 8 goes, with each byte one higher, to sector 9.
    report("read", pread(disk, bytes, SECTOR, 8 * SECTOR));
    for (int i = 0; i < SECTOR; i++)
        bytes[i]++;
    report("write", pwrite(disk, bytes, SECTOR, 9 * SECTOR));
    report("discard", ioctl(disk, BLKDISCARD, range) ? -errno : 0);
    report("zero", ioctl(disk, BLKZEROOUT, zero) ? -errno : 0);
    report("flush", fsync(disk) ? -errno : 0);
    other = open("/dev/vdb", O_RDONLY);
    report("readonly", ioctl(other, BLKROGET, &flag) ? -errno : flag);
    report("other", pread(other, bytes, SECTOR, 0));
    report("first", (unsigned char)bytes[0]);
    close(other);
    int fd = open("/dev/vdb", O_RDWR);
    report("writer", fd < 0 ? -errno : pwrite(fd, bytes, SECTOR, 0) < 0 || fsync(fd) ? -errno : 0);
    report("done", fsync(disk) ? -errno : 0);
    fsync(disk);
    // In good order, as the VMM's port for marks takes it.
    if (ioperm(0x80, 1, 1) == 0)
        outb(0xcf, 0x80);
    reboot(RB_AUTOBOOT);
    return 0;
}
