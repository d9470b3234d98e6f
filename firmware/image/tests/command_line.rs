//! `coffer-image` as who packs an image meets it: one line for what is wrong, and no file.

#[allow(dead_code, reason = "other tests build images from more of it")]
mod support;

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

fn run(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_coffer-image")).current_dir(folder).args(arguments).output().unwrap()
}

/// Writes the parts of an image, and builds one of them with `more`.
fn build(folder: &Path, kernel: &[u8], more: &[&str]) -> Output {
    let parts = [("shim", support::shim(0x90)), ("kernel", kernel.to_vec()), ("cpio", vec![0; 512])];
    for (name, bytes) in parts {
        fs::write(folder.join(name), bytes).unwrap();
    }
    let mut arguments =
        vec!["build", "--shim", "shim", "--kernel", "kernel", "--initramfs", "cpio", "-o", "image"];
    arguments.extend(more);
    run(folder, &arguments)
}

/// The one line that a refusal consists of.
fn refusal(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

#[test]
fn a_kernel_option_that_is_missing_is_named_and_no_image_is_left() {
    for (option, profile) in [("VIRTIO_FS", "up"), ("SECCOMP_FILTER", "smp"), ("AMD_MEM_ENCRYPT", "smp")] {
        let folder = tempfile::tempdir().unwrap();
        let output = build(folder.path(), &support::kernel_without(option, 0x90), &["--profile", profile]);
        let said = refusal(&output);
        assert!(said.contains(&format!("kernel lacks CONFIG_{option}:")), "{said}");
        assert!(said.contains("guest-kernel-config/build"), "no remedy: {said}");
        assert!(!folder.path().join("image").exists() && !folder.path().join("image.new").exists());
    }
}

#[test]
fn what_only_snp_needs_may_be_missing_elsewhere() {
    let folder = tempfile::tempdir().unwrap();
    let output =
        build(folder.path(), &support::kernel_without("AMD_MEM_ENCRYPT", 0x90), &["--profile", "up"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(folder.path().join("image").exists());
}

#[test]
fn help_is_help_behind_a_command_too() {
    let folder = tempfile::tempdir().unwrap();
    for arguments in [&["--help"][..], &["build", "--help"], &["inspect", "-h"]] {
        let output = run(folder.path(), arguments);
        assert!(output.status.success() && output.stderr.is_empty());
        assert!(String::from_utf8(output.stdout).unwrap().contains("coffer-image build --shim ELF"));
    }
}

#[test]
fn an_unknown_flag_and_a_missing_one_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let said = refusal(&run(folder.path(), &["build", "--kernal", "x"]));
    assert!(said.contains("unknown flag `--kernal`"), "{said}");
    let said = refusal(&run(folder.path(), &["build", "--kernel", "x"]));
    assert!(said.contains("--shim is missing"), "{said}");
}
