//! `fuzz-layers`: runs the targets without a nightly compiler: a kept corpus, mutations, no feedback.
//!
//! Owns: mutation and the corpus' files. The input at hand lies in a file before it is tried, and stays there after a panic.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use coffer_layers_fuzz::{TARGETS, Target};

const USAGE: &str = "\
fuzz-layers: feeds mutated inputs to the readers of images

  fuzz-layers TARGET [--seconds S] [--executions N] [--seed N]
  fuzz-layers TARGET FILE          runs one input, for example a finding";
/// Longest input in bytes.
const LONGEST: usize = 64 << 10;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("fuzz-layers: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let mut words = env::args().skip(1);
    let name = words.next().ok_or(USAGE)?;
    let target =
        TARGETS.into_iter().find(|(n, _)| *n == name).ok_or(format!("unknown target {name}\n{USAGE}"))?;
    let (mut seconds, mut executions, mut seed) = (10, u64::MAX, 1);
    while let Some(word) = words.next() {
        let mut number =
            || words.next().and_then(|text| text.parse().ok()).ok_or(format!("{word} wants a number"));
        match word.as_str() {
            "--seconds" => seconds = number()?,
            "--executions" => executions = number()?,
            "--seed" => seed = number()?,
            file => {
                target.1(&fs::read(file).map_err(|e| format!("read {file}: {e}"))?);
                return Ok(());
            }
        }
    }
    fuzz(target, Duration::from_secs(seconds), executions, seed)
}

/// xorshift64*: what comes is the same for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() >> 11) as usize % end.max(1)
    }
}

fn corpus(name: &str) -> Result<Vec<Vec<u8>>, String> {
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus")).join(name);
    let mut paths: Vec<_> = fs::read_dir(&folder)
        .map_err(|e| format!("{}: {e}", folder.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    paths.sort();
    let inputs: Vec<_> = paths.iter().filter_map(|path| fs::read(path).ok()).collect();
    if inputs.is_empty() { Err(format!("{}: no input", folder.display())) } else { Ok(inputs) }
}

fn mutate(data: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    for _ in 0..=random.below(4) {
        let at = random.below(data.len());
        match random.below(8) {
            0 | 1 if !data.is_empty() => data[at] ^= 1 << random.below(8),
            2 if !data.is_empty() => {
                data[at] = *[0, 1, 0x20, 0x30, 0x37, 0x7f, 0x80, 0xff].get(random.below(8)).unwrap_or(&0)
            }
            3 => data.truncate(at),
            4 => data.insert(at, random.next() as u8),
            5 => {
                let end = (at + random.below(64)).min(data.len());
                data.drain(at.min(end)..end);
            }
            6 => {
                let end = (at + random.below(600)).min(data.len());
                let piece = data[at.min(end)..end].to_vec();
                let to = random.below(data.len());
                data.splice(to..to, piece);
            }
            _ => {
                let from = random.below(other.len());
                let end = (from + random.below(600)).min(other.len());
                let to = random.below(data.len()).min(data.len());
                data.splice(to..to, other[from.min(end)..end].iter().copied());
            }
        }
        data.truncate(LONGEST);
    }
    // Most mutations of a tar break a header's sum, and all that is behind it would go unread.
    if random.below(2) == 0 {
        repair_sums(data);
    }
}

/// Makes the checksum of every block right that looks like a header.
fn repair_sums(data: &mut [u8]) {
    for block in data.chunks_exact_mut(512).filter(|block| block.get(257..262) == Some(b"ustar".as_slice())) {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}

fn fuzz((name, function): Target, time: Duration, executions: u64, seed: u64) -> Result<(), String> {
    let corpus = corpus(name)?;
    let mut random = Random(seed.max(1));
    let finding = env::temp_dir().join(format!("fuzz-layers-{name}-{}", std::process::id()));
    let began = Instant::now();
    let mut count = 0u64;
    for input in &corpus {
        function(input);
    }
    while count < executions && began.elapsed() < time {
        let mut data = corpus[random.below(corpus.len())].clone();
        let other = &corpus[random.below(corpus.len())];
        mutate(&mut data, other, &mut random);
        guarded(function, &data, &finding);
        count += 1;
    }
    println!("{name}: {count} executions in {:.1} s, nothing found", began.elapsed().as_secs_f64());
    Ok(())
}

/// Keeps the input of a panic.
fn guarded(function: fn(&[u8]), data: &[u8], finding: &Path) {
    let result = std::panic::catch_unwind(|| function(data));
    if let Err(panic) = result {
        let _ = fs::write(finding, data);
        eprintln!("fuzz-layers: the input is in {}", finding.display());
        std::panic::resume_unwind(panic);
    }
}
