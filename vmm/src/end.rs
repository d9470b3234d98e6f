//! How a VM ends, and what the process says about it.
//!
//! Owns: the reasons, their exit codes and words. Does not own: noticing them.

use coffer_layout::boot::Refusal;

use crate::tee::emulated::machine::termination_words;

/// Exit code after an emulated TEE found what hardware would have stopped.
pub const EMULATION: u8 = 75;

/// Why there is no VM any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// init ended the machine in good order.
    Orderly,
    /// Reset without init's word for it: the kernel panicked, or init failed.
    Panic,
    /// The shim stopped with this code.
    ShimRefused(u8),
    /// The guest asked to be ended.
    GuestTerminated {
        /// Who defines the code.
        set: u8,
        /// Why.
        code: u8,
    },
    /// The emulated TEE saw what hardware would have stopped, or what a sound guest never does.
    Emulation(String),
    /// A fault in the handler of a fault.
    TripleFault,
    /// KVM cannot go on; in words, with registers.
    Kvm(String),
    /// Nobody is left who waits for this pod.
    Abandoned,
    /// Its init was ready and it was saved as a template.
    Stopped,
}

impl End {
    /// Exit code of the process.
    #[must_use]
    pub fn code(&self) -> u8 {
        match self {
            Self::Orderly | Self::Abandoned | Self::Stopped => 0,
            Self::Panic | Self::ShimRefused(_) | Self::GuestTerminated { .. } => 70,
            Self::Emulation(_) => EMULATION,
            Self::TripleFault => 71,
            Self::Kvm(_) => 72,
        }
    }

    /// Short name for scripts.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Orderly => "orderly",
            Self::Panic => "panic",
            Self::ShimRefused(_) => "shim-refused",
            Self::GuestTerminated { .. } => "guest-terminated",
            Self::Emulation(_) => "emulation",
            Self::TripleFault => "triple-fault",
            Self::Kvm(_) => "kvm",
            Self::Abandoned => "abandoned",
            Self::Stopped => "template-made",
        }
    }

    /// One line for people.
    #[must_use]
    pub fn message(&self) -> String {
        match self {
            Self::Orderly => "the guest ended in good order".to_owned(),
            Self::Panic => "the guest's kernel or init failed: boot a debug image with --console to read why".to_owned(),
            Self::ShimRefused(code) => format!("the shim refused to boot: {}", Refusal::words(*code)),
            Self::GuestTerminated { set, code } => {
                format!("the guest ended itself: {} (reason set {set}, code {code})", termination_words(*set, *code))
            }
            Self::Emulation(words) => format!("the emulated TEE stopped the guest: {words}"),
            Self::TripleFault => "the guest faulted three times and was reset: its kernel is broken or does not fit this processor".to_owned(),
            Self::Kvm(words) => format!("KVM cannot go on with the guest: {words}"),
            Self::Abandoned => "nobody waits for this pod any more".to_owned(),
            Self::Stopped => "the template is made".to_owned(),
        }
    }

    /// The exit report: one JSON object.
    #[must_use]
    pub fn report(&self) -> String {
        serde_json::json!({ "reason": self.reason(), "code": self.code(), "message": self.message() })
            .to_string()
            + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_a_triple_fault_and_an_orderly_end_are_told_apart() {
        let ends = [End::Orderly, End::Panic, End::TripleFault, End::Kvm("x".into())];
        let mut codes: Vec<u8> = ends.iter().map(End::code).collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), ends.len());
        let report: serde_json::Value = serde_json::from_str(&End::TripleFault.report()).unwrap();
        assert_eq!((&report["reason"], &report["code"]), (&"triple-fault".into(), &71.into()));
    }
}
