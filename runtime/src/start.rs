//! How a pod's VM comes to be: booted, from a template, or by a shell that waits.
//!
//! Owns: the annotation and the operator's file. Does not own: templates, shells; where there is none that fits, a VM is booted by a
//! process of its own, and `vmm-log` of the container's directory says why.

use std::fs;

use crate::{
    error::Error,
    plan::{self, Plan},
};

/// Where the operator says how pods start.
pub const CONFIGURATION: &str = "/etc/coffer/start";
/// The same for one pod.
pub const ANNOTATION: &str = "io.coffer.start";

/// How.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Booted.
    Boot,
    /// From the machine saved for its shape.
    Template,
    /// Booted by a process that has begun before the pod was there.
    Pool,
}

impl Start {
    fn word(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Template => "template",
            Self::Pool => "pool",
        }
    }

    fn of(source: &str, word: &str) -> Result<Self, Error> {
        let all = [Self::Boot, Self::Template, Self::Pool];
        all.into_iter().find(|start| start.word() == word.trim()).ok_or_else(|| {
            Error::Bundle(format!("{source}: `{}` is neither boot nor template nor pool", word.trim()))
        })
    }

    /// Why a pod in a TEE does not start so.
    fn not_in_a_tee(self) -> Option<&'static str> {
        match self {
            Self::Boot => None,
            Self::Template => Some("a snapshot's state cannot be measured at launch"),
            Self::Pool => Some("a shell's VM is made without a TEE, and KVM does not change a VM's kind"),
        }
    }

    /// Why a pod with a scratch disk, a console, or processors that wait does not start so.
    fn not_with_more(self) -> Option<&'static str> {
        (self == Self::Template)
            .then_some("a template has no disk and no console, and its processors all run")
    }
}

/// How a pod is to start: what its annotation says, else what the operator's file says.
///
/// # Errors
/// [`Error::Bundle`] for other words, and for a pod whose annotation asks for what it cannot have.
pub fn wanted(plan: &Plan) -> Result<Start, Error> {
    let annotation = plan.spec.annotations().as_ref().and_then(|a| a.get(ANNOTATION)).map(String::as_str);
    let tee = plan.confidential.tee.as_deref().filter(|tee| *tee != "none");
    let operator = fs::read_to_string(CONFIGURATION).ok();
    let disk = plan.scratch.is_some().then_some("io.coffer.scratch");
    let console = plan.console().map(|_| plan::CONSOLE_ANNOTATION);
    let waiting = (plan.most_vcpus > plan.vcpus).then_some(plan::MOST_VCPUS_ANNOTATION);
    decide(annotation, operator.as_deref(), tee, disk.or(console).or(waiting))
}

fn decide(
    annotation: Option<&str>,
    operator: Option<&str>,
    tee: Option<&str>,
    other: Option<&str>,
) -> Result<Start, Error> {
    let start = match (annotation, operator) {
        (Some(word), _) => Start::of(&format!("annotation {ANNOTATION}"), word)?,
        // The operator's word has no effect in a TEE, whatever it is.
        (None, _) if tee.is_some() => Start::Boot,
        (None, Some(word)) => Start::of(CONFIGURATION, word)?,
        (None, None) => Start::Boot,
    };
    let in_tee = tee.and_then(|tee| Some((format!("io.coffer.tee={tee}"), start.not_in_a_tee()?)));
    let with_other = other.and_then(|other| Some((other.to_owned(), start.not_with_more()?)));
    match (in_tee.or(with_other), annotation) {
        (None, _) => Ok(start),
        (Some(_), None) => Ok(Start::Boot),
        (Some((with, why)), Some(_)) => {
            Err(Error::Bundle(format!("annotation {ANNOTATION}={} with {with}: {why}", start.word())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_annotation_goes_before_the_operators_word_and_no_tee_gets_what_it_cannot_have() {
        let is =
            |annotation, operator, tee| decide(annotation, operator, tee, None).map_err(|e| e.to_string());
        assert_eq!(is(None, None, None), Ok(Start::Boot));
        assert_eq!(is(None, Some("template\n"), None), Ok(Start::Template));
        assert_eq!(is(None, Some("pool\n"), None), Ok(Start::Pool));
        assert_eq!(is(Some("boot"), Some("template"), None), Ok(Start::Boot));
        assert_eq!(is(Some("template"), None, None), Ok(Start::Template));
        assert_eq!(is(Some("pool"), Some("template"), None), Ok(Start::Pool));
        for word in ["template", "pool", "fast"] {
            assert_eq!(is(None, Some(word), Some("snp")), Ok(Start::Boot));
        }
        assert_eq!(is(Some("boot"), None, Some("snp")), Ok(Start::Boot));
        assert!(is(Some("template"), None, Some("snp")).unwrap_err().contains("cannot be measured"));
        assert!(is(Some("pool"), None, Some("snp")).unwrap_err().contains("made without a TEE"));
        assert!(is(Some("fast"), None, None).unwrap_err().contains("io.coffer.start: `fast`"));
        assert!(is(None, Some("fast"), None).unwrap_err().contains(CONFIGURATION));
    }

    #[test]
    fn a_template_has_no_disk_and_a_shell_may_get_one() {
        let is = |annotation, operator| {
            decide(annotation, operator, None, Some("io.coffer.scratch")).map_err(|e| e.to_string())
        };
        assert_eq!(is(None, Some("template")), Ok(Start::Boot));
        assert!(is(Some("template"), None).unwrap_err().contains("has no disk"));
        assert_eq!(is(Some("pool"), None), Ok(Start::Pool));
    }
}
