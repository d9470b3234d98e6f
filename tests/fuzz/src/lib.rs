//! Runs fuzz targets without a nightly compiler: a kept corpus, mutations, and feedback where the build has counters.
//!
//! Owns: the command line of every crate of fuzz targets, the corpus' files, what happens to a finding. Does not own: targets,
//! which take any bytes and panic when something is wrong.
//!
//! A crate of targets has a `main` that is one call of [`Fuzz::main`]. Built plainly, inputs are mutations of the kept corpus.
//! Built with the counters that LLVM offers on every compiler (`tests/fuzz/build`), inputs that reach something new join the
//! corpus of that run.

mod coverage;
mod found;
mod mutate;

use std::{
    env, fs,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use coverage::Coverage;
use mutate::Random;

/// A target: its name, which is also its folder's in the corpus, and what it does with bytes.
pub type Target = (&'static str, fn(&[u8]));
/// An honest input: its target, its file's name, its bytes.
pub type Seed = (&'static str, &'static str, Vec<u8>);

const USAGE: &str = "\
feeds mutated inputs to fuzz targets

  TARGET|all [--seconds S] [--processor-seconds S] [--executions N] [--seed N] [--keep DIR]
                     10 seconds each, unless told; --keep writes inputs that reached something new
  TARGET FILE...     runs these inputs, for example a finding
  TARGET merge DIR   adds to the corpus what of DIR/TARGET reaches something that the corpus and smaller inputs do not
  seeds              writes honest inputs to the corpus";
/// Inputs that a run adds to its corpus.
const MOST_ADDED: usize = 20_000;
/// An input that takes longer than this is a finding.
const PATIENCE: Duration = Duration::from_secs(120);

/// A crate of fuzz targets.
#[derive(Clone, Copy)]
pub struct Fuzz<'a> {
    /// The crate's folder (`CARGO_MANIFEST_DIR`), in which `corpus/TARGET` holds honest inputs, and `corpus/TARGET.cpio.gz` what runs have found.
    pub folder: &'a str,
    /// What there is to run.
    pub targets: &'a [Target],
    /// Longest input in bytes.
    pub longest: usize,
    /// Done to half of the mutated inputs: makes right what mutations always break, for example a checksum.
    pub repair: fn(&mut [u8]),
    /// What `seeds` writes.
    pub seeds: fn() -> Vec<Seed>,
}

/// What one run of a target is bounded by.
struct Bounds {
    time: Duration,
    /// For a run beside other work: what it got of a processor.
    processor: Duration,
    executions: u64,
    seed: u64,
    keep: Option<PathBuf>,
}

impl<'a> Fuzz<'a> {
    /// Targets with inputs of at most 64 KiB, nothing to repair, no seeds but the corpus.
    #[must_use]
    pub fn new(folder: &'a str, targets: &'a [Target]) -> Self {
        Self { folder, targets, longest: 64 << 10, repair: |_| {}, seeds: Vec::new }
    }

    /// Does what the command line says.
    #[must_use]
    pub fn main(&self) -> ExitCode {
        match self.run(env::args().skip(1)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(message) => {
                eprintln!("fuzz: {message}");
                ExitCode::FAILURE
            }
        }
    }

    fn run(&self, mut words: impl Iterator<Item = String>) -> Result<(), String> {
        let names: Vec<&str> = self.targets.iter().map(|(name, _)| *name).collect();
        let usage = || format!("{USAGE}\n\ntargets: {}", names.join(", "));
        let name = words.next().ok_or_else(usage)?;
        if name == "seeds" {
            return self.write_seeds();
        }
        let chosen: Vec<Target> =
            self.targets.iter().filter(|(n, _)| name == "all" || *n == name).copied().collect();
        if chosen.is_empty() {
            return Err(format!("unknown target `{name}`: {}", usage()));
        }
        let mut bounds = Bounds {
            time: Duration::from_secs(10),
            processor: Duration::MAX,
            executions: u64::MAX,
            seed: 1,
            keep: None,
        };
        let (mut timed, mut files) = (false, Vec::new());
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or(format!("{word} wants a value"));
            let number = |text: String| text.parse().map_err(|_| format!("{word} {text}: not a number"));
            match word.as_str() {
                "--seconds" => {
                    bounds.time = Duration::from_secs(number(value()?)?);
                    timed = true;
                }
                "--processor-seconds" => bounds.processor = Duration::from_secs(number(value()?)?),
                "--executions" => bounds.executions = number(value()?)?,
                "--seed" => bounds.seed = number(value()?)?,
                "--keep" => bounds.keep = Some(value()?.into()),
                "merge" => {
                    let from = PathBuf::from(value()?);
                    return chosen.iter().try_for_each(|target| self.merge(*target, &from));
                }
                flag if flag.starts_with('-') => return Err(format!("unknown flag {flag}: {}", usage())),
                _ => files.push(word),
            }
        }
        if (bounds.executions < u64::MAX || bounds.processor < Duration::MAX) && !timed {
            bounds.time = Duration::MAX;
        }
        for (_, function) in chosen.iter().filter(|_| !files.is_empty()) {
            for file in &files {
                function(&fs::read(file).map_err(|e| format!("read {file}: {e}"))?);
            }
        }
        if files.is_empty() {
            chosen.iter().try_for_each(|target| self.fuzz(*target, &bounds))?;
        }
        Ok(())
    }

    fn corpus(&self, name: &str) -> PathBuf {
        Path::new(self.folder).join("corpus").join(name)
    }

    fn found(&self, name: &str) -> PathBuf {
        self.corpus(name).with_extension("cpio.gz")
    }

    /// The whole corpus.
    fn inputs(&self, name: &str) -> Result<Vec<Vec<u8>>, String> {
        let (mut inputs, archive) = (read_all(&self.corpus(name))?, self.found(name));
        inputs.extend(found::read(&archive).map_err(|e| format!("read {}: {e}", archive.display()))?);
        Ok(inputs)
    }

    fn write_seeds(&self) -> Result<(), String> {
        for (name, file, bytes) in (self.seeds)() {
            let folder = self.corpus(name);
            fs::create_dir_all(&folder)
                .and_then(|()| fs::write(folder.join(file), bytes))
                .map_err(|e| format!("write {}: {e}", folder.display()))?;
        }
        Ok(())
    }

    fn merge(&self, (name, function): Target, from: &Path) -> Result<(), String> {
        let mut coverage = Coverage::new();
        if coverage.size() == 0 {
            return Err("merge needs a build with counters: tests/fuzz/build".to_owned());
        }
        let watch = Watch::new(name);
        for input in self.inputs(name)? {
            watch.execute(function, &input);
            coverage.is_new();
        }
        let (before, mut inputs) = (coverage.seen(), read_all(&from.join(name))?);
        inputs.sort_by_key(Vec::len);
        let (archive, mut kept) = (self.found(name), 0);
        let failed = |e| format!("{}: {e}", archive.display());
        let mut found = found::read(&archive).map_err(failed)?;
        for input in &inputs {
            watch.execute(function, input);
            let seen = coverage.seen();
            // A further edge, not the same ones another number of times.
            if coverage.is_new() && coverage.seen() > seen {
                kept += 1;
                found.push(input.clone());
            }
        }
        found::write(&archive, &found).map_err(failed)?;
        println!(
            "{name}: {kept} of {} inputs, {before} counters reached before, {} now",
            inputs.len(),
            coverage.seen()
        );
        Ok(())
    }

    fn fuzz(&self, (name, function): Target, bounds: &Bounds) -> Result<(), String> {
        let mut inputs = self.inputs(name)?;
        let kept = inputs.len();
        let mut random = Random::new(bounds.seed);
        let mut coverage = Coverage::new();
        let watch = Watch::new(name);
        let (began, processor) = (Instant::now(), processor_time());
        for input in &inputs {
            watch.execute(function, input);
            coverage.is_new();
        }
        let (mut done, mut input) = (0u64, Vec::with_capacity(self.longest));
        let over = || began.elapsed() >= bounds.time || processor_time() - processor >= bounds.processor;
        // The clocks are read now and then only, unless executions are slow.
        while done < bounds.executions && (done % 16 != 0 || !over()) {
            input.clear();
            input.extend_from_slice(&inputs[random.below(inputs.len())]);
            let other = random.below(inputs.len());
            mutate::mutate(&mut input, &inputs[other], &mut random, self.longest);
            if random.below(2) == 0 {
                (self.repair)(&mut input);
            }
            watch.execute(function, &input);
            done += 1;
            if coverage.is_new() && inputs.len() - kept < MOST_ADDED {
                if let Some(folder) = &bounds.keep {
                    let file = folder.join(name).join(format!("{:08}", inputs.len()));
                    fs::create_dir_all(folder.join(name))
                        .and_then(|()| fs::write(&file, &input))
                        .map_err(|e| format!("write {}: {e}", file.display()))?;
                }
                inputs.push(input.clone());
            }
        }
        let feedback = match coverage.size() {
            0 => "without feedback".to_owned(),
            size => {
                format!(
                    "{} of {size} counters reached, {} inputs found",
                    coverage.seen(),
                    inputs.len() - kept
                )
            }
        };
        println!(
            "{name}: {done} executions in {:.1} s, {:.1} of a processor, {feedback}: no finding",
            began.elapsed().as_secs_f64(),
            (processor_time() - processor).as_secs_f64()
        );
        Ok(())
    }
}

/// What all threads of this process had of a processor.
fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec, which outlives the call; this clock is there on every Linux, so that nothing can fail.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

fn read_all(folder: &Path) -> Result<Vec<Vec<u8>>, String> {
    let failed = |e| format!("read {}: {e}", folder.display());
    let entries = fs::read_dir(folder).map_err(failed)?;
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    let inputs = paths.iter().map(fs::read).collect::<Result<Vec<_>, _>>().map_err(failed)?;
    if inputs.is_empty() { Err(format!("{} is empty", folder.display())) } else { Ok(inputs) }
}

/// The input at hand, for who looks when it never comes back.
struct Watch {
    at_hand: &'static Mutex<(Vec<u8>, u64)>,
    finding: PathBuf,
}

impl Watch {
    /// The thread that looks lives as long as the process, which is as long as a run.
    fn new(name: &str) -> Self {
        let at_hand: &'static Mutex<(Vec<u8>, u64)> = Box::leak(Box::default());
        let finding = env::temp_dir().join(format!("finding-{name}-{}", std::process::id()));
        let path = finding.clone();
        thread::spawn(move || {
            let mut before = 0;
            loop {
                thread::sleep(PATIENCE);
                let at_hand = at_hand.lock().unwrap_or_else(PoisonError::into_inner);
                if at_hand.1 == before && before % 2 == 1 {
                    keep(&path, &at_hand.0, "does not come to an end");
                    std::process::exit(1);
                }
                before = at_hand.1;
            }
        });
        Self { at_hand, finding }
    }

    /// Runs one input; when it panics the input is in a file.
    fn execute(&self, function: fn(&[u8]), input: &[u8]) {
        // An odd count: one is at hand.
        let count = |input: Option<&[u8]>| {
            let mut at_hand = self.at_hand.lock().unwrap_or_else(PoisonError::into_inner);
            at_hand.1 += 1;
            if let Some(input) = input {
                at_hand.0.clear();
                at_hand.0.extend_from_slice(input);
            }
        };
        count(Some(input));
        coverage::clear();
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| function(input))) {
            keep(&self.finding, input, "panicked");
            resume_unwind(panic);
        }
        count(None);
    }
}

fn keep(path: &Path, input: &[u8], what: &str) {
    match fs::write(path, input) {
        Ok(()) => eprintln!("fuzz: {what}: the input is in {}", path.display()),
        Err(error) => eprintln!("fuzz: {what}; write {}: {error}", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn folder(inputs: &[&[u8]]) -> PathBuf {
        let folder =
            env::temp_dir().join(format!("coffer-fuzz-{}-{:?}", std::process::id(), thread::current().id()));
        fs::create_dir_all(folder.join("corpus/it")).unwrap();
        for (index, input) in inputs.iter().enumerate() {
            fs::write(folder.join(format!("corpus/it/{index}")), input).unwrap();
        }
        folder
    }

    fn run(folder: &Path, target: fn(&[u8]), line: &str) -> Result<(), String> {
        let folder_name = folder.to_str().unwrap();
        let targets = [("it", target)];
        let fuzz = Fuzz { longest: 40, ..Fuzz::new(folder_name, &targets) };
        fuzz.run(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn what_panics_is_found_and_its_input_kept() {
        let folder = folder(&[b"aaaaaaaaaaaaaaaa"]);
        let target: fn(&[u8]) = |data| assert!(data.len() <= 40 && data.iter().all(|b| *b != b'A'));
        let found = catch_unwind(AssertUnwindSafe(|| run(&folder, target, "it --executions 1000000")));
        assert!(found.is_err(), "a bit of one byte is all it takes");
        let file = env::temp_dir().join(format!("finding-it-{}", std::process::id()));
        assert!(fs::read(&file).unwrap().contains(&b'A'));
        assert!(
            catch_unwind(AssertUnwindSafe(|| run(&folder, target, &format!("it {}", file.display()))))
                .is_err()
        );
        fs::remove_file(file).unwrap();
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn what_runs_have_found_is_a_part_of_the_corpus() {
        let folder = folder(&[b"honest"]);
        let archive = folder.join("corpus/it.cpio.gz");
        assert_eq!(found::read(&archive).unwrap(), Vec::<Vec<u8>>::new());
        let inputs = [b"".to_vec(), b"found".to_vec(), vec![0xc7; 5000]];
        found::write(&archive, &inputs).unwrap();
        let fuzz = Fuzz::new(folder.to_str().unwrap(), &[]);
        assert_eq!(fuzz.inputs("it").unwrap(), [&[b"honest".to_vec()], &inputs[..]].concat());
        // As other programs read it.
        let listed = Command::new("sh")
            .args(["-c", "zcat it.cpio.gz | busybox cpio -t"])
            .current_dir(folder.join("corpus"))
            .output();
        assert_eq!(String::from_utf8_lossy(&listed.unwrap().stdout), "00000\n00001\n00002\n");
        fs::write(&archive, "no archive").unwrap();
        assert!(fuzz.inputs("it").unwrap_err().contains("it.cpio.gz"));
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn runs_are_bounded_and_wrong_words_are_named() {
        let folder = folder(&[b"a", b"b"]);
        let nothing: fn(&[u8]) = |_| {};
        assert_eq!(run(&folder, nothing, "all --executions 100"), Ok(()));
        // Of its own processor time: other tests' threads may use it, too, but it comes to an end.
        assert_eq!(run(&folder, nothing, "all --processor-seconds 1"), Ok(()));
        for (line, word) in [
            ("", "targets: it"),
            ("none", "`none`"),
            ("it --second 1", "--second"),
            ("it --seed x", "--seed x"),
            ("it nofile", "nofile"),
        ] {
            assert!(run(&folder, nothing, line).unwrap_err().contains(word), "{line}");
        }
        fs::remove_dir_all(folder).unwrap();
    }
}
