#!/usr/bin/env bash
# ./make [PROFILE...]: builds Coffer into target/home: bin/{coffer,coffer-vmm,coffer-image} and images/PROFILE.igvm.
# Profiles: up (one processor, no TEE), smp, and up-debug and smp-debug, which have a serial console. Without words: up smp.
# Installs the Debian packages that are missing. A kernel takes some minutes once per machine; without changes this takes a second.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
profiles=("$@")
[ $# -gt 0 ] || profiles=(up smp)
for p in "${profiles[@]}"; do
    case $p in
    up | smp | up-debug | smp-debug) ;;
    -h | --help) sed -n '2,4s/^# //p' "$0"; exit 0 ;;
    *) echo "make: unknown profile \`$p\`: name up, smp, up-debug or smp-debug" >&2; exit 2 ;;
    esac
done
command -v cargo >/dev/null || { echo "make: no cargo: install Rust 1.95 or later (https://rustup.rs)" >&2; exit 1; }
# /usr/src has the source as an archive; a shallow clone of this repository has no kernel in it.
tests/install gcc libc6-dev linux-source-6.12 make flex bison bc libelf-dev xz-utils

# Steps of ./test run side by side, and each may call this. -o: what cargo leaves running does not keep the lock.
mkdir -p target
[ -n "${COFFER_MAKE_LOCKED:-}" ] || COFFER_MAKE_LOCKED=1 exec flock -o target/make.lock "$PWD/make" "$@"

# Kernels beside the programs: linking those keeps one processor busy for minutes. In a process group of its own, so that all of it ends with this.
set -m
(for p in "${profiles[@]}"; do guest-kernel-config/build "$p"; done) </dev/null &
kernels=$!
set +m
trap 'kill -- -$kernels 2>/dev/null || true' EXIT
trap 'exit 130' INT TERM

# Static programs: init has no library in the guest, and coffer and coffer-vmm start in mount namespaces that show others.
triple=x86_64-unknown-linux-gnu
export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C target-feature=+crt-static"
target=${CARGO_TARGET_DIR:-target}
built=$target/$triple/release
cargo build -q --release --target $triple -p coffer -p coffer-vmm -p coffer-init -p coffer-image
# The guest with one processor has no TEE and no owner's secrets, so its init is built without what they need: half of it. Small before fast: each of its
# pages is copied at every boot, 2,500 instructions, and what it does itself is a hundredth of that. Relocations by RELR, a tenth as long.
CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS+=" -C link-arg=-Wl,-z,pack-relative-relocs" CARGO_PROFILE_RELEASE_OPT_LEVEL=z \
    cargo build -q --release --target $triple --target-dir "$target/plain" -p coffer-init --no-default-features
# The shim is a flat program with its own linker script, which takes no other flags.
CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS="" cargo build -q --release -p coffer-shim
shim=$target/release/coffer-shim

home=target/home
mkdir -p $home/bin $home/images
for program in coffer coffer-vmm coffer-image; do
    # A new file under the old name: one that runs keeps its own.
    if [ "$built/$program" -nt $home/bin/$program ]; then
        cp "$built/$program" $home/bin/$program.new
        mv $home/bin/$program.new $home/bin/$program
    fi
done
wait $kernels
trap - EXIT
for p in "${profiles[@]}"; do
    kernel=target/kernel/$p/vmlinux image=$home/images/$p.igvm init=$built/coffer-init fresh=
    case $p in up*) init=$target/plain/$triple/release/coffer-init ;; esac
    for input in "$kernel" "$shim" "$init" "$built/coffer-image"; do
        [ "$image" -nt "$input" ] || fresh=1
    done
    emulated=$home/images/smp-emulated.igvm
    [ "$p" != smp ] || [ -e "$emulated" ] || fresh=1
    [ -n "$fresh" ] || continue
    pack() { "$built/coffer-image" build --shim "$shim" --kernel "$kernel" --init "$init" --profile "$p" "$@"; }
    # The emulated SNP machine has its C-bit where hardware has none: what is built for one does not start on the other.
    [ "$p" != smp ] || pack --c-bit 47 -o "$emulated"
    pack -o "$image"
done
