//! `coffer-kbs`: the test KBS on its own.

use std::{
    fs,
    io::{self, BufRead, Write},
    net::TcpListener,
    sync::Arc,
};

use anyhow::{Context, bail};
use coffer_attestation::{encoding::from_hex, hash::canonical_json};
use coffer_kbs::{Config, Identity, Kbs, serve};

const USAGE: &str = "\
coffer-kbs: a KBS for tests and the demo; keeps everything in memory

  --listen ADDRESS:PORT      default 127.0.0.1:8080
  --tls-cert FILE            speak TLS with a new certificate, written here, to be put into initdata
  --name NAME                name or address in that certificate, again for each; default the address
  --resource PATH=FILE       serve FILE as repository/type/tag, again for each
  --snp-root FILE            PEM certificates that SNP evidence must lead to
  --measurement HEX          launch digest to accept, again for each; none: any
  --policy FILE              resource policy in Rego
  --allow-all                give everything to everybody, sample evidence too
  --admin                    answer admin calls from anybody

coffer-kbs --canonical: instead, write each line of JSON on stdin as RFC 8785 has it, for comparison with other people's";

fn main() -> anyhow::Result<()> {
    let mut config = Config::default();
    let (mut listen, mut certificate, mut names) = ("127.0.0.1:8080".to_owned(), None, Vec::new());
    let mut words = std::env::args().skip(1);
    while let Some(flag) = words.next() {
        let mut value = || words.next().with_context(|| format!("{flag} wants a value"));
        let read = |path: &str| fs::read(path).with_context(|| format!("read {path}"));
        match flag.as_str() {
            "--help" | "-h" => {
                println!("{USAGE}");
                return Ok(());
            }
            "--canonical" => return canonical(),
            "--listen" => listen = value()?,
            "--tls-cert" => certificate = Some(value()?),
            "--name" => names.push(value()?),
            "--resource" => {
                let pair = value()?;
                let (path, file) = pair.split_once('=').context("--resource PATH=FILE")?;
                config.resources.insert(path.to_owned(), read(file)?);
            }
            "--snp-root" => config.snp_roots = Some(String::from_utf8(read(&value()?)?)?),
            "--measurement" => {
                let bytes = from_hex(&value()?)?;
                config.measurements.push(bytes.try_into().ok().context("--measurement: 48 bytes in hex")?);
            }
            "--policy" => config.policy = Some(String::from_utf8(read(&value()?)?)?),
            "--allow-all" => config.allow_all = true,
            "--admin" => config.admin = true,
            _ => bail!("unknown flag {flag}\n{USAGE}"),
        }
    }
    let listener = TcpListener::bind(&listen).with_context(|| format!("listen on {listen}"))?;
    let address = listener.local_addr()?;
    if names.is_empty() {
        names.push(address.ip().to_string());
    }
    let identity = match certificate {
        None => None,
        Some(file) => {
            let identity = Identity::self_signed(names)?;
            fs::write(&file, &identity.certificate_pem).with_context(|| format!("write {file}"))?;
            Some(identity)
        }
    };
    let running = serve(Arc::new(Kbs::new(config)?), listener, identity.as_ref())?;
    println!("listening on {address}");
    running.join();
    Ok(())
}

/// The form over which evidence is made, of any document.
fn canonical() -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let value: serde_json::Value = serde_json::from_str(&line?)?;
        out.write_all(&canonical_json(&value))?;
        out.write_all(b"\n")?;
    }
    Ok(())
}
