//! `fuzz-firmware`: runs the targets without a nightly compiler: a kept corpus, mutations, no feedback.
//!
//! Owns: mutation and the corpus' files. A finding is written to a file before the panic ends the process.

use std::{
    env, fs,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use coffer_firmware_fuzz::{TARGETS, seeds};

const USAGE: &str = "\
fuzz-firmware: feeds mutated inputs to the shim's readers

  fuzz-firmware run [TARGET] [--executions N] [--seconds S] [--seed N] [--corpus DIR]
  fuzz-firmware one TARGET FILE      runs one input, for example a finding
  fuzz-firmware seeds [--corpus DIR]       writes honest inputs to the corpus

targets: parameters, hash-page, cpuid-page, ghcb; all of them when none is named";
/// Longest input: a page and a little.
const LONGEST: usize = 4200;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("fuzz-firmware: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let mut words = env::args().skip(1);
    let command = words.next().unwrap_or_default();
    let (mut executions, mut seconds, mut seed, mut names) = (u64::MAX, u64::MAX, 1, Vec::new());
    let mut corpus = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus"));
    while let Some(word) = words.next() {
        let mut number = || -> Result<u64, String> {
            let text = words.next().ok_or(format!("{word} wants a value"))?;
            text.parse().map_err(|_| format!("{word} {text}: not a number"))
        };
        match word.as_str() {
            "--executions" => executions = number()?,
            "--seconds" => seconds = number()?,
            "--seed" => seed = number()?,
            "--corpus" => corpus = words.next().ok_or("--corpus wants a directory")?.into(),
            _ => names.push(word),
        }
    }
    let target = |name: &str| {
        TARGETS.into_iter().find(|(n, _)| *n == name).ok_or(format!("unknown target `{name}`\n{USAGE}"))
    };
    match command.as_str() {
        "run" if executions < u64::MAX || seconds < u64::MAX => {
            let targets = match names.first() {
                Some(name) => vec![target(name)?],
                None => TARGETS.to_vec(),
            };
            for (name, function) in targets {
                fuzz(name, function, &corpus, executions, Duration::from_secs(seconds.min(1 << 30)), seed)?;
            }
            Ok(())
        }
        "run" => Err("give --executions or --seconds".to_owned()),
        "one" => match names.as_slice() {
            [name, file] => {
                target(name)?.1(&fs::read(file).map_err(|e| format!("read {file}: {e}"))?);
                Ok(())
            }
            _ => Err(USAGE.to_owned()),
        },
        "seeds" => write_seeds(&corpus),
        _ => Err(USAGE.to_owned()),
    }
}

fn write_seeds(corpus: &std::path::Path) -> Result<(), String> {
    let seeds: [(&str, &str, Vec<u8>); 5] = [
        ("parameters", "honest", seeds::parameters().to_vec()),
        ("parameters", "full", seeds::full_parameters().to_vec()),
        ("hash-page", "honest", seeds::handoff().to_page().to_vec()),
        ("cpuid-page", "honest", seeds::cpuid().to_vec()),
        ("ghcb", "honest", seeds::answers().to_vec()),
    ];
    for (name, file, bytes) in seeds {
        let directory = corpus.join(name);
        // Zeros at the end are what a shorter input has anyway.
        let length = bytes.iter().rposition(|b| *b != 0).map_or(0, |at| at + 1);
        fs::create_dir_all(&directory)
            .and_then(|()| fs::write(directory.join(file), &bytes[..length]))
            .map_err(|e| format!("write {}: {e}", directory.display()))?;
    }
    Ok(())
}

fn fuzz(
    name: &str,
    target: fn(&[u8]),
    corpus: &std::path::Path,
    executions: u64,
    time: Duration,
    seed: u64,
) -> Result<(), String> {
    let directory = corpus.join(name);
    let failed = |e| format!("read {}: {e}", directory.display());
    let mut paths: Vec<PathBuf> =
        fs::read_dir(&directory).map_err(failed)?.filter_map(|e| Some(e.ok()?.path())).collect();
    paths.sort();
    let mut inputs: Vec<Vec<u8>> = Vec::new();
    for path in &paths {
        inputs.push(fs::read(path).map_err(failed)?);
    }
    if inputs.is_empty() {
        return Err(format!("{} is empty: fuzz-firmware seeds", directory.display()));
    }
    let finding = env::temp_dir().join(format!("finding-{name}"));
    let mut random = Random(seed ^ 0x9e37_79b9_7f4a_7c15);
    let (began, mut done) = (Instant::now(), 0u64);
    let mut input = Vec::with_capacity(LONGEST);
    for whole in &inputs {
        execute(target, whole, &finding);
    }
    // The clock is read now and then only.
    while done < executions && (done % 1024 != 0 || began.elapsed() < time) {
        input.clear();
        input.extend_from_slice(&inputs[random.below(inputs.len())]);
        let other = &inputs[random.below(inputs.len())];
        for _ in 0..=random.below(6) {
            mutate(&mut input, other, &mut random);
        }
        execute(target, &input, &finding);
        done += 1;
    }
    println!("{name}: {done} executions in {:.1} s, nothing found", began.elapsed().as_secs_f64());
    Ok(())
}

/// Runs one input; when it panics the input is in a file.
fn execute(target: fn(&[u8]), input: &[u8], finding: &std::path::Path) {
    let result = std::panic::catch_unwind(|| target(input));
    if let Err(panic) = result {
        match fs::write(finding, input) {
            Ok(()) => eprintln!("fuzz-firmware: the input is in {}", finding.display()),
            Err(error) => eprintln!("fuzz-firmware: write {}: {error}", finding.display()),
        }
        std::panic::resume_unwind(panic);
    }
}

/// Numbers that sit on edges.
const EDGES: [u64; 16] = [
    0,
    1,
    2,
    0x7f,
    0x80,
    0xff,
    0xfff,
    0x1000,
    0x9_fc00,
    0x10_0000,
    0xc000_0000,
    0xffff_ffff,
    1 << 32,
    512 << 30,
    u64::MAX >> 12,
    u64::MAX,
];

fn mutate(input: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let at = random.below(input.len().max(1));
    match random.below(8) {
        0 => {
            if let Some(byte) = input.get_mut(at) {
                *byte ^= 1 << random.below(8);
            }
        }
        1 => {
            if let Some(byte) = input.get_mut(at) {
                *byte = random.next() as u8;
            }
        }
        // A number where numbers are.
        2 | 3 => {
            let (at, size) = (at & !7, [4, 8][random.below(2)]);
            let edge = EDGES[random.below(EDGES.len())].wrapping_add(random.below(3) as u64).wrapping_sub(1);
            overwrite(input, at, &edge.to_le_bytes()[..size]);
        }
        4 => input.truncate(at),
        5 => {
            let length = random.below(64);
            let bytes: Vec<u8> = (0..length).map(|_| random.next() as u8).collect();
            overwrite(input, at, &bytes);
        }
        // A piece of itself somewhere else: entries that are there twice.
        6 => {
            let (from, length) = (random.below(input.len().max(1)) & !7, random.below(97) & !7);
            let bytes = input.get(from..(from + length).min(input.len())).unwrap_or_default().to_vec();
            overwrite(input, at & !7, &bytes);
        }
        _ => {
            let from = random.below(other.len().max(1));
            let length = random.below(256);
            let bytes = other.get(from..(from + length).min(other.len())).unwrap_or_default().to_vec();
            overwrite(input, from, &bytes);
        }
    }
}

fn overwrite(input: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    let end = (at + bytes.len()).min(LONGEST);
    if input.len() < end {
        input.resize(end, 0);
    }
    for (to, from) in input.iter_mut().skip(at).zip(bytes) {
        *to = *from;
    }
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}
