//! What CPUID tells the guest: what KVM supports, with this machine's topology.
//!
//! Owns: the leaves that differ from KVM's. Never adds a feature that KVM does not report.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};

const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPER_THREADING: u32 = 1 << 28;
const MEMORY_TYPE_RANGES: u32 = 1 << 12;
const RDRAND: u32 = 1 << 30;
const X2APIC_LEVEL_CORE: u32 = 2;
const X2APIC_LEVEL_THREAD: u32 = 1;

/// KVM's own answer.
///
/// # Errors
/// KVM's.
pub fn supported(kvm: &Kvm) -> Result<CpuId, kvm_ioctls::Error> {
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    for entry in cpuid.as_mut_slice() {
        if entry.function == 1 {
            entry.ecx |= HYPERVISOR;
            // KVM emulates it in the kernel's local APIC and reports it as a capability only.
            if deadline {
                entry.ecx |= TSC_DEADLINE;
            }
        }
    }
    Ok(cpuid)
}

/// The answer without MTRRs, for a guest without a TEE: it has no device whose memory they would have to describe, KVM ignores them,
/// and Linux spends some 60 exits on reading them and writing them back. Page attributes (PAT) are left.
#[must_use]
pub fn without_memory_type_ranges(base: &CpuId) -> CpuId {
    let mut cpuid = base.clone();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 | 0x8000_0001 => entry.edx &= !MEMORY_TYPE_RANGES,
            _ => {}
        }
    }
    cpuid
}

/// Whether the processor makes random numbers itself: then Linux needs no entropy device for its generator's seed.
#[must_use]
pub fn has_random_numbers(base: &CpuId) -> bool {
    base.as_slice().iter().any(|entry| entry.function == 1 && entry.ecx & RDRAND != 0)
}

/// The answer for one processor: one socket, one thread a core.
#[must_use]
pub fn for_vcpu(base: &CpuId, id: u32, count: u32) -> CpuId {
    let mut cpuid = base.clone();
    let bits = count.next_power_of_two().trailing_zeros();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x1 => {
                entry.ebx = (entry.ebx & 0xffff) | (count & 0xff) << 16 | id << 24;
                if count > 1 {
                    entry.edx |= HYPER_THREADING;
                } else {
                    entry.edx &= !HYPER_THREADING;
                }
            }
            // Cores that share a cache, and cores in the package; one thread each.
            0x4 => entry.eax = (entry.eax & 0x3fff) | (count - 1).min(63) << 26,
            0xb | 0x1f => {
                let (shift, number, level) = match entry.index {
                    0 => (0, 1, X2APIC_LEVEL_THREAD),
                    1 => (bits, count, X2APIC_LEVEL_CORE),
                    _ => (0, 0, 0),
                };
                (entry.eax, entry.ebx, entry.ecx, entry.edx) =
                    (shift, number, level << 8 | entry.index & 0xff, id);
            }
            0x8000_0008 => entry.ecx = bits << 12 | (count - 1) & 0xff,
            0x8000_001e => (entry.eax, entry.ebx) = (id, id & 0xff),
            _ => {}
        }
    }
    cpuid
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_cpuid_entry2;

    fn base() -> CpuId {
        let leaf = |function, index| kvm_cpuid_entry2 { function, index, ecx: 0x1234, ..Default::default() };
        CpuId::from_entries(&[leaf(1, 0), leaf(7, 0), leaf(0xb, 0), leaf(0xb, 1), leaf(0x8000_0008, 0)])
            .unwrap()
    }

    #[test]
    fn topology_is_one_socket_of_single_threaded_cores() {
        let cpuid = for_vcpu(&base(), 2, 4);
        let leaves = cpuid.as_slice();
        assert_eq!(leaves[0].ebx, 2 << 24 | 4 << 16);
        assert_eq!((leaves[2].ebx, leaves[3].eax, leaves[3].ebx, leaves[3].edx), (1, 2, 4, 2));
        assert_eq!(leaves[4].ecx, 2 << 12 | 3);
    }

    #[test]
    fn memory_type_ranges_are_hidden_and_nothing_else() {
        let leaf = |function, edx| kvm_cpuid_entry2 { function, edx, ..Default::default() };
        let all = CpuId::from_entries(&[leaf(1, !0), leaf(7, !0), leaf(0x8000_0001, !0)]).unwrap();
        let got: Vec<u32> =
            without_memory_type_ranges(&all).as_slice().iter().map(|entry| entry.edx).collect();
        assert_eq!(got, [0xffff_efff, 0xffff_ffff, 0xffff_efff]);
    }

    #[test]
    fn random_numbers_are_found_in_leaf_1_alone() {
        let leaf = |function, ecx| kvm_cpuid_entry2 { function, ecx, ..Default::default() };
        let has = |leaves: &[kvm_cpuid_entry2]| has_random_numbers(&CpuId::from_entries(leaves).unwrap());
        assert!(has(&[leaf(0, 0), leaf(1, 0x4000_0000)]));
        assert!(!has(&[leaf(1, !0x4000_0000), leaf(7, !0)]));
        assert!(!has(&[]));
    }

    #[test]
    fn feature_leaves_are_left_as_kvm_gives_them() {
        assert_eq!(for_vcpu(&base(), 0, 1).as_slice()[1], base().as_slice()[1]);
    }
}
