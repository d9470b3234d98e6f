//! `coffer template`: makes, lists and removes the saved machines from which pods start.
//!
//! Owns: the words. Does not own: templates (`crate::template`).

use std::{io::Write, path::Path};

use crate::{
    cli::Call,
    error::Error,
    home::Home,
    plan::{DEFAULT_MEMORY_MIB, LEAST_MEMORY_MIB, MOST_VCPUS},
    template::{self, MOST_NETS, Shape},
};

/// Exit code 0, or an error.
pub(super) fn template(call: &Call, root: &Path) -> Result<i32, Error> {
    let words: Vec<&str> = call.words.iter().map(String::as_str).collect();
    let say = |line: &str| {
        // A reader that has seen enough may close.
        let _ = writeln!(std::io::stdout(), "{line}");
    };
    match words[..] {
        ["make"] => say(&template::make(root, &shape(call)?)?.display().to_string()),
        ["list"] => template::list(root).iter().for_each(|name| say(name)),
        ["remove", name] => template::remove(root, name)?,
        _ => return Err(Error::Usage("template: make, list or remove NAME: see coffer --help".into())),
    }
    Ok(0)
}

/// The machine that a pod without limits has, unless flags say otherwise.
fn shape(call: &Call) -> Result<Shape, Error> {
    let number = |flag: &str, usual: u64, least: u64, most: u64| match call.value(flag) {
        None => Ok(usual),
        Some(text) => text.parse().ok().filter(|n| (least..=most).contains(n)).ok_or_else(|| {
            Error::Usage(format!("template: --{flag} {text} is not a number from {least} to {most}"))
        }),
    };
    let vcpus = number("vcpus", 1, 1, MOST_VCPUS.into())? as u32;
    Ok(Shape {
        image: Home::find()?.image(vcpus, None, false),
        memory_mib: number("memory", DEFAULT_MEMORY_MIB, LEAST_MEMORY_MIB, 1 << 20)?,
        vcpus,
        nets: number("nets", 1, 0, MOST_NETS as u64)? as usize,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::parse;

    fn of(line: &str) -> Result<Shape, Error> {
        shape(&parse(line.split_whitespace().map(str::to_owned)).unwrap())
    }

    #[test]
    fn flags_are_numbers_within_bounds() {
        let usual = of("template make").unwrap();
        assert_eq!((usual.memory_mib, usual.vcpus, usual.nets), (512, 1, 1));
        let other = of("template make --memory 128 --vcpus 2 --nets 0").unwrap();
        assert_eq!((other.memory_mib, other.vcpus, other.nets), (128, 2, 0));
        assert!(other.image.ends_with("images/smp.igvm"));
        for line in ["--memory 64", "--vcpus 0", "--nets 4", "--memory much"] {
            assert!(of(&format!("template make {line}")).is_err(), "{line}");
        }
    }
}
