# What crun's test_mounts.py uses of util-linux's Python binding, which Debian does not package: without a module of this name
# that file reports no tests at all.
class _Filesystem:
    def __init__(self, line):
        mount, _, filesystem = line.partition(" - ")
        self.target, self.vfs_options = mount.split()[4:6]
        self.fs_options = filesystem.split()[2]


class Table:
    def __init__(self, path):
        with open(path) as lines:
            self._entries = [_Filesystem(line) for line in lines if " - " in line]

    def find_target(self, target):
        return next((entry for entry in reversed(self._entries) if entry.target == target), None)
