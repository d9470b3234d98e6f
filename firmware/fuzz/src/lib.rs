//! Fuzz targets: everything that the shim reads and a host may have written, on a machine that only checks.
//!
//! Owns: the targets and what must hold whatever the bytes are. Each takes any bytes, and panics when something is wrong.

mod machine;
pub mod seeds;

use coffer_fuzz::Target;
use coffer_layout::{
    PAGE,
    boot::{Handoff, LOW_END},
};
use coffer_shim::{boot_params, plan::plan, snp};
use machine::Checked;

/// A page: as many bytes as it holds, zeros behind.
type Page = [u8; PAGE as usize];

/// The targets by name.
pub const TARGETS: [Target; 4] =
    [("parameters", parameters), ("hash-page", hash_page), ("cpuid-page", cpuid_page), ("ghcb", ghcb)];

fn page(data: &[u8]) -> Page {
    let mut page = [0; PAGE as usize];
    for (to, from) in page.iter_mut().zip(data) {
        *to = *from;
    }
    page
}

/// The parameter page: on a plain VM and under SEV-SNP.
pub fn parameters(data: &[u8]) {
    let parameters = page(data);
    let handoff = seeds::handoff();
    if let Ok(plan) = plan(&handoff, &parameters) {
        let (mut end, mut count) = (0, 0);
        for ram in plan.ram() {
            assert!(ram.start >= end && ram.start < ram.end);
            end = ram.end;
            count += 1;
        }
        assert!(count > 0 && count <= coffer_layout::boot::MEMORY_MAP_MAX);
        assert!(plan.usable().all(|ram| ram.start < ram.end && (ram.end <= LOW_END || ram.start >= 1 << 20)));
        assert!((1..=64).contains(&plan.processors));
        let mut bytes = [0; PAGE as usize];
        boot_params::write(&plan, &mut bytes);
        assert!(bytes[0x1e8] <= 128);
    }
    let mut machine = Checked::honest();
    let _ = snp::prepare(&mut machine, &handoff, &parameters, &seeds::cpuid());
}

/// The hash page. It is measured, but a broken one must not do harm either.
pub fn hash_page(data: &[u8]) {
    let Some(handoff) = Handoff::from_page(&page(data)) else { return };
    assert_eq!(Handoff::from_page(&handoff.to_page()), Some(handoff));
    let parameters = seeds::parameters();
    let mut machine = Checked::honest();
    machine.answers_as(&handoff);
    let _ = snp::prepare(&mut machine, &handoff, &parameters, &seeds::cpuid());
}

/// The CPUID page.
pub fn cpuid_page(data: &[u8]) {
    let page = page(data);
    for c_bit in [47, 51] {
        if snp::cpuid::check(&page, c_bit).is_ok() {
            let count = u32::from_le_bytes(core::array::from_fn(|i| page[i]));
            assert!((1..=64).contains(&count));
        }
    }
}

/// What a hypervisor answers: eight bytes for each exit.
pub fn ghcb(data: &[u8]) {
    let parameters = seeds::parameters();
    let mut machine = Checked::answering(data);
    let handoff = seeds::handoff();
    if snp::prepare(&mut machine, &handoff, &parameters, &seeds::cpuid()).is_ok() {
        let _ = snp::tell(&mut machine, coffer_layout::mark::KERNEL_ENTRY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Else nothing behind the first check would be fuzzed.
    #[test]
    fn honest_inputs_are_accepted() {
        let (handoff, parameters) = (seeds::handoff(), seeds::parameters());
        let answers = seeds::answers();
        let mut machine = Checked::answering(&answers);
        assert!(snp::prepare(&mut machine, &handoff, &parameters, &seeds::cpuid()).is_ok());
        assert!(snp::tell(&mut machine, coffer_layout::mark::KERNEL_ENTRY).is_ok());
        assert!(plan(&handoff, &seeds::full_parameters()).is_ok());
        for (_, target) in TARGETS {
            target(&[]);
        }
    }
}
