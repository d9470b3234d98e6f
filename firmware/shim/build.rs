//! Links the shim as a flat program at its fixed address.

fn main() {
    let directory = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it");
    println!("cargo:rerun-if-changed=shim.ld");
    for argument in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,--gc-sections",
        "-Wl,-z,norelro",
    ] {
        println!("cargo:rustc-link-arg-bin=coffer-shim={argument}");
    }
    println!("cargo:rustc-link-arg-bin=coffer-shim=-Wl,-T,{directory}/shim.ld");
}
