//! `coffer-report`: the `sev` crate as the judge of what the emulated SNP machine's guest reads.
//!
//! Owns: a report by `/dev/sev-guest` as that crate asks for it, and the checks of a report and its certificates outside.
//! Does not own: what the fields should be; the test that calls this compares them.
#![forbid(unsafe_code)]

use std::{fs, path::Path, process::ExitCode};

use anyhow::{Context, Result, bail, ensure};
use coffer_attestation::{snp, verify};
use coffer_vmm::tee::emulated::chain::Chain as Root;
use sev::{
    certs::snp::{Chain, Verifiable, builtin},
    firmware::{
        guest::{AttestationReport, Firmware},
        host::CertTableEntry,
    },
    parser::ByteParser,
};

const USAGE: &str = "coffer-report root DIR                     make a development root
coffer-report read DATA REPORT TABLE       in a guest: a report over 64 bytes, and the host's certificates
coffer-report verify DIR REPORT TABLE      check them against the root in DIR, and print the report's fields";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["root", directory] => Root::open(Path::new(directory)).map(drop).map_err(Into::into),
        ["read", data, report, table] => read(data, report, table),
        ["verify", directory, report, table] => verify(Path::new(directory), report, table),
        _ => Err(anyhow::anyhow!("{USAGE}")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("coffer-report: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bytes(path: &str) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {path}"))
}

fn read(data: &str, report: &str, table: &str) -> Result<()> {
    let Ok(data) = <[u8; 64]>::try_from(bytes(data)?) else { bail!("{data} has not 64 bytes") };
    let mut device = Firmware::open().context("open /dev/sev-guest")?;
    let answer = device.get_ext_report(None, Some(data), Some(0)).map_err(|e| anyhow::anyhow!("{e:?}"))?;
    let (bytes, certificates) = answer;
    fs::write(report, bytes)?;
    let certificates = certificates.context("the host gave no certificates")?;
    fs::write(table, CertTableEntry::cert_table_to_vec_bytes(&certificates)?)?;
    Ok(())
}

fn verify(root: &Path, report: &str, table: &str) -> Result<()> {
    let (report, table) = (bytes(report)?, bytes(table)?);
    let entries = CertTableEntry::vec_bytes_to_cert_table(&mut table.clone())?;
    let chain = Chain::from_cert_table_der(entries)?;
    let parsed = AttestationReport::from_bytes(&report)?;
    (&chain, &parsed).verify().context("the sev crate does not believe it")?;
    // What the host sends along is anybody's: the root is what makes it worth something.
    let ark = fs::read(root.join("ark.der")).context("read the root")?;
    let certificates = snp::certificate_table(&table)?;
    ensure!(certificates.iter().any(|c| c.kind == "ARK" && c.der == ark), "another ARK came along");
    let mut amd = chain.clone();
    amd.ca.ark = builtin::milan::ark()?;
    ensure!((&amd, &parsed).verify().is_err(), "it leads to AMD's root");
    let mut changed = report.clone();
    changed[0x90] ^= 1;
    let changed = AttestationReport::from_bytes(&changed)?;
    ensure!((&chain, &changed).verify().is_err(), "a changed report is believed");

    // This project's own verifier has to come to the same.
    let ours = snp::Report::from_bytes(&report)?;
    let pem = pem(&ark);
    let expected = verify::Expected { report_data: ours.report_data(), host_data: None };
    let evidence = snp::evidence_json(&ours, &certificates);
    verify::verify_snp(&evidence, &verify::Trust::from_pem(&pem)?, &expected)?;

    println!("version {} vmpl {} policy {:#x}", parsed.version, parsed.vmpl, u64::from(parsed.policy));
    println!("measurement {}", hex::encode(parsed.measurement));
    println!("host_data {}", hex::encode(parsed.host_data));
    println!("report_data {}", hex::encode(parsed.report_data));
    Ok(())
}

fn pem(der: &[u8]) -> String {
    let body = coffer_attestation::encoding::to_base64(der);
    format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n")
}
