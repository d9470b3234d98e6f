//! What only a KBS can give: asked for beside the pod's containers, never before them.

use std::fs;

use coffer_replay::{Bench, Gave, config, until};
use serde_json::{Value, json};

/// Of the form: a header that names a key of the KBS, which is asked for first, no payload and no signature.
const SEALED: &str = "sealed.eyJhbGciOiJFUzI1NiIsImtpZCI6ImticzovLy9hL2IvYyJ9.e30.AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

/// The pod goes on while this waits for its KBS, and what it gave once the KBS has gone.
#[track_caller]
fn waits(bench: &Bench, call: impl FnOnce() -> Gave + Send) -> Gave {
    std::thread::scope(|scope| {
        let call = scope.spawn(call);
        until(|| bench.read("kbs.out").contains("POST /kbs/v0/auth"));
        let _ = bench.call(&["kill", "beside", "USR1"]).ok();
        until(|| bench.read("beside.out") == "asked\n");
        assert!(bench.call(&["ps", "beside"]).ok().contains("sh"));
        assert!(!call.is_finished());
        let _ = bench.call(&["kill", "kbs", "TERM"]).ok();
        bench.wait_stopped("kbs");
        assert!(bench.read("kbs.out").ends_with("over\n"), "{}", bench.read("kbs.out"));
        let gave = call.join().unwrap();
        assert_eq!(bench.call(&["exec", "beside", "echo", "later"]).ok(), "later\n");
        gave
    })
}

fn member(change: impl FnOnce(&mut Value)) -> Value {
    let mut config = config(&["echo", "it runs"]);
    config["annotations"]["io.kubernetes.cri-o.SandboxID"] = json!("kbs");
    change(&mut config);
    config
}

#[test]
fn the_pod_is_served_while_a_variable_waits_for_its_key() {
    let bench = Bench::new();
    bench.start_silent_kbs();
    let variable = json!(["PATH=/bin", format!("A={SEALED}")]);
    let bundle = bench.bundle("m", &member(|config| config["process"]["env"] = variable));
    let _ = waits(&bench, || bench.create("m", &bundle)).failed(1);
    let why = bench.logged("m");
    assert!(why.contains("environment variable A: sealed secret: key kbs:///a/b/c"), "{why}");
    // The same id again.
    bench.start("m", &member(|_| {}));
    bench.wait_stopped("m");
    assert_eq!(bench.read("m.out"), "it runs\n");
}

#[test]
fn the_pod_is_served_while_a_file_waits_for_its_key() {
    let bench = Bench::new();
    bench.start_silent_kbs();
    fs::write(bench.path("secret"), SEALED).unwrap();
    let mount = json!({ "destination": "/srv/secret", "type": "bind", "source": bench.path("secret"), "options": ["bind"] });
    let bundle = bench.bundle("m", &member(|config| config["mounts"].as_array_mut().unwrap().push(mount)));
    let _ = waits(&bench, || bench.create("m", &bundle)).failed(1);
    let why = bench.logged("m");
    assert!(why.contains("file /srv/secret: sealed secret: key kbs:///a/b/c"), "{why}");
}

#[test]
fn the_pod_is_served_while_an_execs_variable_waits_for_its_key() {
    let bench = Bench::new();
    bench.start_silent_kbs();
    let variable = format!("A={SEALED}");
    let said = waits(&bench, || bench.call(&["exec", "--env", &variable, "beside", "true"])).failed(255);
    assert!(said.contains("environment variable A: sealed secret: key kbs:///a/b/c"), "{said}");
}
