//! The calls of podman 4.3.1 and conmon 2.1.6 for a container's life, as they were recorded.

use std::fs;

use coffer_replay::{Bench, config};
use serde_json::json;

#[test]
fn a_container_goes_from_created_to_running_to_stopped_to_gone() {
    let bench = Bench::new();
    let bundle = bench.bundle("c", &config(&["sh", "-c", "echo out; echo err >&2; exit 42"]));
    assert_eq!(bench.create("c", &bundle).ok(), "");
    let state = bench.state("c").unwrap();
    let pid = bench.pid("c");
    assert_eq!(
        (&state["ociVersion"], &state["id"], &state["status"], &state["pid"], &state["bundle"]),
        (&json!("1.0.2-dev"), &json!("c"), &json!("created"), &json!(pid), &json!(bundle))
    );
    assert_eq!(state["annotations"], json!({ "io.container.manager": "libpod" }));
    let _ = bench.call(&["start", "c"]).ok();
    bench.wait_stopped("c");
    assert_eq!(bench.state("c").unwrap()["pid"], 0);
    assert_eq!((bench.read("c.out"), bench.read("c.err")), ("out\n".into(), "err\n".into()));
    let _ = bench.call(&["delete", "--force", "c"]).ok();
    assert!(bench.state("c").unwrap_err().contains("container does not exist"));
    assert_eq!(fs::read_dir(bench.root()).unwrap().count(), 0);
    // podman says it twice at times.
    let _ = bench.call(&["delete", "--force", "c"]).ok();
}
