//! Why the shim does not go on: one code and one sentence for each reason.
//!
//! Owns: the table. Without a TEE the code is written to the mark port behind [`crate::mark::SHIM_REFUSED`]; under
//! SEV-SNP it is the reason code of a GHCB termination request in the set [`crate::snp::TERMINATION_SET`].

macro_rules! refusals {
    ($($(#[$doc:meta])* $name:ident = $code:literal: $words:literal,)*) => {
        /// Why the shim does not go on. The VMM prints the words.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Refusal {
            $($(#[$doc])* $name = $code,)*
        }

        impl Refusal {
            /// Every reason.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// What a code means, in words.
            #[must_use]
            pub const fn words(code: u8) -> &'static str {
                match code {
                    $($code => $words,)*
                    _ => "an unknown reason",
                }
            }
        }
    };
}

refusals! {
    /// The handoff page is not one of this shim's.
    Handoff = 1: "the image's handoff page is not this shim's: build the image again with one coffer-image",
    /// No processors, or more than there may be.
    Processors = 2: "the number of processors is 0 or over 64",
    /// The memory map is empty, unsorted, overlapping, too high or wraps around.
    MemoryMap = 3: "the memory map is empty, unsorted, overlapping, beyond 512 GiB or wraps around",
    /// Kernel or initramfs do not lie in RAM.
    DoesNotFit = 4: "the kernel or the initramfs does not lie in RAM: give the guest more memory",
    /// The command line is too long.
    CommandLine = 5: "the command line is too long",
    /// The shim itself failed.
    Internal = 6: "the shim failed",
    /// The hash page's regions are not disjoint ranges inside RAM.
    HashPage = 7: "the hash page lists regions that overlap, wrap around or lie outside the kernel's place: build the image again",
    /// The memory map lacks pages that were launched.
    LaunchPages = 8: "the memory map leaves out pages that the launch measured",

    /// SEV_STATUS is not what the image was made for.
    SevStatus = 0x10: "SEV_STATUS is not what the image was built for: it must be SEV, SEV-ES and SEV-SNP with no further feature",
    /// The CPUID page or the hypervisor has the C-bit elsewhere.
    CBit = 0x11: "the C-bit is not where the image has it: build the image with --c-bit of this platform (51 on Milan, Genoa and Turin; 47 when emulated)",
    /// The CPUID page's form is wrong.
    CpuidPage = 0x12: "the CPUID page has no entries, over 64, or one that is unknown or there twice",
    /// The CPUID page's contents contradict each other.
    CpuidLeaves = 0x13: "the CPUID page lacks a leaf that every SNP guest has, or its leaves are swapped",
    /// The hypervisor does not speak GHCB protocol 2.
    GhcbProtocol = 0x14: "the hypervisor does not offer GHCB protocol version 2",
    /// The hypervisor lacks a feature.
    HypervisorFeatures = 0x15: "the hypervisor does not offer SEV-SNP, or no AP creation for more than one processor",
    /// The GHCB could not be registered.
    GhcbRegistration = 0x16: "the hypervisor did not register the GHCB where the shim asked for it",
    /// The hypervisor answered an exit with an error.
    GhcbExit = 0x17: "the hypervisor answered a GHCB exit with an error",

    /// PVALIDATE changed nothing: the page had been validated before.
    AlreadyValid = 0x20: "a page was already valid: the host maps one page twice",
    /// PVALIDATE failed.
    Pvalidate = 0x21: "PVALIDATE failed on a page of the memory map",

    /// The kernel's hash differs.
    KernelHash = 0x30: "the kernel is not the one that was measured: its SHA-384 differs from the hash page",
    /// The initramfs's hash differs.
    InitramfsHash = 0x31: "the initramfs is not the one that was measured: its SHA-384 differs from the hash page",
    /// The command line's hash differs.
    CommandLineHash = 0x32: "the command line is not the one that was measured: its SHA-384 differs from the hash page",

    /// An exception without a reason of its own.
    Exception = 0x40: "the shim met an exception that it did not expect",
    /// #VC: an access that needs the hypervisor.
    VmmCommunication = 0x41: "the shim met #VC: a page was not validated, or the hypervisor intercepts what it must not",
    /// #PF.
    PageFault = 0x42: "the shim met a page fault: memory is not as the measured page tables say",
}
