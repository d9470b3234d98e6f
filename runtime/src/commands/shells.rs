//! `coffer pool`: fills, shows and empties the pool of shells that pods start from.
//!
//! Owns: the words. Does not own: shells (`crate::pool`).

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use crate::{
    cli::Call,
    error::Error,
    home::Home,
    pool::{self, MOST, Shown},
};

/// Exit code 0, or an error.
pub(super) fn pool(call: &Call, root: &Path) -> Result<i32, Error> {
    let words: Vec<&str> = call.words.iter().map(String::as_str).collect();
    let say = |line: &str| {
        // A reader that has seen enough may close.
        let _ = writeln!(std::io::stdout(), "{line}");
    };
    match words[..] {
        ["fill"] => {
            let (image, count) = wanted(call)?;
            pool::fill(root, &Home::find()?.vmm(), &image, count)?.iter().for_each(|name| say(name));
        }
        ["list"] => pool::list(root, &Home::find()?.vmm()).iter().for_each(|shell| say(&line(shell))),
        ["drain"] => pool::drain(root)?,
        _ => return Err(Error::Usage("pool: fill, list or drain: see coffer --help".into())),
    }
    Ok(0)
}

/// The image that a pod of one processor boots, and one shell, unless flags say otherwise.
fn wanted(call: &Call) -> Result<(PathBuf, usize), Error> {
    let count =
        match call.value("count") {
            None => 1,
            Some(text) => text.parse().ok().filter(|n| (1..=MOST).contains(n)).ok_or_else(|| {
                Error::Usage(format!("pool: --count {text} is not a number from 1 to {MOST}"))
            })?,
        };
    let image = match call.value("image") {
        None => Home::find()?.image(1, None, false),
        Some(path) => path.into(),
    };
    Ok((image, count))
}

fn line(shell: &Shown) -> String {
    let unfit = shell.unfit.as_ref().map(|why| format!(" unfit: {why}")).unwrap_or_default();
    format!("{} {} {}{unfit}", shell.name, shell.pid, shell.image.display())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::parse;

    fn of(line: &str) -> Result<(PathBuf, usize), Error> {
        wanted(&parse(line.split_whitespace().map(str::to_owned)).unwrap())
    }

    #[test]
    fn a_pool_has_shells_of_one_image_and_not_any_number_of_them() {
        let (image, count) = of("pool fill").unwrap();
        assert!(image.ends_with("images/up.igvm") && count == 1, "{image:?}");
        assert_eq!(of("pool fill --count 3 --image /i").unwrap(), ("/i".into(), 3));
        for count in ["0", "257", "some"] {
            assert!(of(&format!("pool fill --count {count}")).unwrap_err().to_string().contains(count));
        }
        for words in ["pool", "pool make", "pool drain all"] {
            let call = parse(words.split_whitespace().map(str::to_owned)).unwrap();
            assert!(pool(&call, Path::new("/nonexistent")).is_err(), "{words}");
        }
    }

    #[test]
    fn a_shell_is_a_line() {
        let shell = Shown { name: "1".into(), pid: 7, image: "/i".into(), unfit: None };
        assert_eq!(line(&shell), "1 7 /i");
        assert_eq!(line(&Shown { unfit: Some("old".into()), ..shell }), "1 7 /i unfit: old");
    }
}
