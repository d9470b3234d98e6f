//! Which of Debian's kernel modules the machine loads, in which order.

use std::collections::HashMap;

/// Loaded before the host's files are there: what shows them, and KVM. Everything else is loaded by modprobe when it is
/// first used: an emulated CPU needs 50 to 100 ms for each module.
pub(crate) const WANTED: [&str; 5] = ["virtio_pci", "9pnet_virtio", "9p", "overlay", "kvm_amd"];

/// The files to load, in order, out of the text of `modules.dep`. Names that are not in it are built in.
///
/// depmod lists what a module needs as a whole, nearest first: the reverse of the loading order.
pub(crate) fn order(modules_dep: &str, wanted: &[&str]) -> Vec<String> {
    let mut needs = HashMap::new();
    let mut files = HashMap::new();
    for line in modules_dep.lines() {
        let Some((path, rest)) = line.split_once(':') else { continue };
        needs.insert(path, rest.split_whitespace().collect::<Vec<_>>());
        files.insert(name(path), path);
    }
    let mut order: Vec<String> = Vec::new();
    for wanted in wanted {
        let Some(path) = files.get(*wanted) else { continue };
        let dependencies = needs.get(path).into_iter().flatten().rev();
        for file in dependencies.chain([path]) {
            if !order.iter().any(|o| o == file) {
                order.push((*file).to_owned());
            }
        }
    }
    order
}

/// `kernel/fs/9p/9p.ko.xz` is `9p`; the kernel takes `-` and `_` in names for the same.
fn name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_module_needs_comes_before_it_and_once() {
        let dep = "k/a.ko.xz:\nk/b-c.ko.xz: k/a.ko.xz\nk/d.ko.xz: k/b-c.ko.xz k/a.ko.xz\nk/e.ko: k/a.ko.xz\n";
        assert_eq!(order(dep, &["d", "e", "built_in"]), ["k/a.ko.xz", "k/b-c.ko.xz", "k/d.ko.xz", "k/e.ko"]);
        assert_eq!(order(dep, &["b_c"]), ["k/a.ko.xz", "k/b-c.ko.xz"]);
    }
}
