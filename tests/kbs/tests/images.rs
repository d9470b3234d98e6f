//! An encrypted image in a guest with a KBS: what goes over the wire for it, and that its layers come meanwhile.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    process::Command,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use coffer_attestation::{
    evidence::{Attester, Attesters, BoundData, EvidenceError, Sample},
    guest::Guest,
    initdata::Initdata,
};
use coffer_init::owner;
use coffer_kbs::{Config, Kbs, serve};
use coffer_layers::{
    digest::Digest,
    encrypt::{Recipient, encrypt},
    image::{Image, Trust},
    layout::{Blobs, Layout},
    manifest::{Descriptor, MANIFEST, architecture},
    unpack::Options,
};
use serde_json::{Value, json};

const KEY: [u8; 32] = [9; 32];
const LAYERS: usize = 30;

/// What happened, in order: `layer` when the first bytes of one were read, otherwise a request's first line.
#[derive(Clone, Default)]
struct Events(Arc<(Mutex<Vec<String>>, Condvar)>);

impl Events {
    fn add(&self, event: &str) {
        self.0.0.lock().unwrap().push(event.into());
        self.0.1.notify_all();
    }

    /// Waits until a layer was asked for; whether it was.
    fn layer_asked(&self) -> bool {
        let none = |events: &mut Vec<String>| !events.iter().any(|e| e == "layer");
        let waited = self.0.1.wait_timeout_while(self.0.0.lock().unwrap(), Duration::from_secs(60), none);
        !waited.unwrap().1.timed_out()
    }

    fn all(&self) -> Vec<String> {
        self.0.0.lock().unwrap().clone()
    }
}

/// A host that tells when a layer is read first.
struct Host<'a>(&'a Layout, Vec<Digest>, Events);

struct Telling(Box<dyn Read + Send>, Option<Events>);

impl Read for Telling {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(events) = self.1.take() {
            events.add("layer");
        }
        self.0.read(buffer)
    }
}

impl Blobs for Host<'_> {
    fn open(&self, digest: &Digest) -> io::Result<Box<dyn Read + Send>> {
        let events = self.1.contains(digest).then(|| self.2.clone());
        Ok(Box::new(Telling(self.0.open(digest)?, events)))
    }
}

/// A KBS that answers nothing before a layer was asked for: a relay before a real one.
fn reluctant(kbs: SocketAddr, events: Events) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut guest in listener.incoming().flatten() {
            let (mut there, events) = (TcpStream::connect(kbs).unwrap(), events.clone());
            let (mut answers, mut back) = (there.try_clone().unwrap(), guest.try_clone().unwrap());
            thread::spawn(move || io::copy(&mut answers, &mut back));
            thread::spawn(move || {
                let mut buffer = [0; 64 << 10];
                while let Ok(n @ 1..) = guest.read(&mut buffer) {
                    let line = buffer[..n].split(|b| *b == b'\r').next().unwrap_or_default();
                    if line.starts_with(b"POST ") || line.starts_with(b"GET ") {
                        events.add(std::str::from_utf8(line).unwrap());
                    }
                    if !events.layer_asked() || there.write_all(&buffer[..n]).is_err() {
                        break;
                    }
                }
            });
        }
    });
    address
}

/// Sample evidence, and a launch that initdata is bound to, as on SEV-SNP: what a report is taken for there is counted.
struct Counted(Arc<AtomicUsize>, [u8; 32]);

impl Attester for Counted {
    fn tee(&self) -> &'static str {
        Sample.tee()
    }

    fn evidence(&mut self, report_data: &[u8]) -> Result<Value, EvidenceError> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Sample.evidence(report_data)
    }

    fn bound_data(&mut self) -> Result<Option<BoundData>, EvidenceError> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(Some(BoundData::HostData(self.1)))
    }
}

/// An image of many layers of a file each.
fn image(layout: &Layout) -> Descriptor {
    let (mut layers, mut ids) = (Vec::new(), Vec::new());
    for n in 0..LAYERS {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(format!("file{n}")), format!("layer {n}")).unwrap();
        let tar = Command::new("tar").arg("-C").arg(dir.path()).args(["-c", "."]).output().unwrap().stdout;
        layers.push(layout.put("application/vnd.oci.image.layer.v1.tar", &tar).unwrap());
        ids.push(Digest::sha256(&tar));
    }
    let put = |kind: &str, text: &Value| layout.put(kind, text.to_string().as_bytes()).unwrap();
    let config = put(
        "application/vnd.oci.image.config.v1+json",
        &json!({"architecture": architecture(), "os": "linux", "config": {"Cmd": ["/bin/true"]},
            "rootfs": {"type": "layers", "diff_ids": ids}}),
    );
    put(MANIFEST, &json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers}))
}

#[test]
fn attestation_is_one_report_and_two_round_trips_while_the_first_layer_comes() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::create(dir.path().join("layout")).unwrap();
    let recipient = Recipient::Resource { kid: "kbs:///images/key/1".into(), key: KEY.to_vec().into() };
    let made = encrypt(&layout, &image(&layout), &layout, "e", &[recipient], &AtomicU64::new(0)).unwrap();

    let resources = BTreeMap::from([("images/key/1".to_owned(), KEY.to_vec())]);
    let kbs = Kbs::new(Config { resources, allow_all: true, ..Config::default() }).unwrap();
    let kbs = serve(Arc::new(kbs), TcpListener::bind("127.0.0.1:0").unwrap(), None).unwrap();
    let events = Events::default();
    let initdata = format!(
        "version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n\"aa.toml\" = '''\n[token_configs.kbs]\nurl = \"http://{}\"\n'''\n\
         \"coffer.toml\" = '''\nallow_plain_http = true\n'''\n",
        reluctant(kbs.address, events.clone())
    );
    let reports = Arc::<AtomicUsize>::default();
    let bound = Initdata::parse(initdata.as_bytes()).unwrap().bound::<32>();
    let attester = Attesters::of(Counted(reports.clone(), bound));
    let guest = Guest::new(Some(initdata.as_bytes()), attester).unwrap();
    // Whether the launch is bound to this initdata: what a KBS is told has its nonce, which is in no report before it is asked.
    assert_eq!(reports.load(Ordering::Relaxed), 1);
    let owner = owner::of(&Arc::new(Mutex::new(guest))).unwrap();

    let image = Image::load(&layout, &made.digest, Trust::Pinned).unwrap();
    let layers = image.manifest.layers.iter().map(|layer| layer.digest.clone()).collect();
    let host = Host(&layout, layers, events.clone());
    let options = Options { privileged: false, budget: 16 << 20 };
    image.unpack(&host, &*owner.keys, &dir.path().join("root"), options, &AtomicU64::new(0)).unwrap();

    let last = format!("root/file{}", LAYERS - 1);
    assert_eq!(fs::read_to_string(dir.path().join(last)).unwrap(), format!("layer {}", LAYERS - 1));
    assert_eq!(reports.load(Ordering::Relaxed), 2);
    let all = events.all();
    // The handshake's two, and the key, which the layers share.
    assert_eq!(
        all.iter().filter(|e| *e != "layer").map(String::as_str).collect::<Vec<_>>(),
        [
            "POST /kbs/v0/auth HTTP/1.1",
            "POST /kbs/v0/attest HTTP/1.1",
            "GET /kbs/v0/resource/images/key/1 HTTP/1.1"
        ]
    );
    assert_eq!(all.iter().filter(|e| *e == "layer").count(), LAYERS);
    assert!(all[..2].contains(&"layer".to_owned()), "{all:?}");
}
