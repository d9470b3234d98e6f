//! From an image to everything that an SNP launch does, before any system call.
//!
//! Owns: which pages are launched, in file order and with neighbours joined, and that KVM measures what the image says.
//! The same plan starts a guest on hardware and an emulated one.

use coffer_layout::{
    PAGE,
    snp::{SHARED_BASE, SHARED_END, VMSA_GPA},
};
use thiserror::Error;

use super::{
    abi::{ID_AUTH, ID_BLOCK, policy},
    digest::PageType,
    vmsa::{Vmsa, VmsaError},
};
use crate::{
    igvm::{Directive, IdBlock, Image, PageKind},
    launch::{self, Areas, LaunchError},
};

/// Most pages, beside VMSAs, that are launched: each costs about a millisecond of the security processor.
pub const PAGES_MAX: u64 = 24;
/// Most commands from LAUNCH_START to LAUNCH_FINISH.
pub const COMMANDS_MAX: usize = 24;

/// Why an image cannot be launched.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PlanError {
    /// As without a TEE.
    #[error(transparent)]
    Layout(#[from] LaunchError),
    /// The first processor's state.
    #[error(transparent)]
    Vmsa(#[from] VmsaError),
    /// No state.
    #[error("image has no SNP VP context: nothing says where to start")]
    NoVmsa,
    /// KVM measures the VMSA last, at one address.
    #[error(
        "image has its VMSA at {gpa:#x}, {order}: KVM measures it at {VMSA_GPA:#x} after all pages, so the launch digest would not be the image's"
    )]
    VmsaPlace {
        /// Where.
        gpa: u64,
        /// When.
        order: &'static str,
    },
    /// No policy.
    #[error("image has no SNP guest policy: build it with this VMM's coffer-image, or give --policy")]
    NoPolicy,
    /// KVM refuses it.
    #[error("policy {policy:#x}: {problem}")]
    Policy {
        /// The policy.
        policy: u64,
        /// What is wrong.
        problem: &'static str,
    },
    /// The launch would be slow.
    #[error(
        "image launches {0} pages privately, at most {PAGES_MAX} are allowed: each costs about a millisecond; make the kernel and initramfs shared pages"
    )]
    TooManyPages(u64),
    /// The launch would be slow.
    #[error(
        "image needs {0} launch commands, at most {COMMANDS_MAX} are allowed: put its private pages side by side"
    )]
    TooManyCommands(usize),
    /// Shared bytes must not lie in RAM, where they would be private.
    #[error(
        "image has a shared page at {0:#x}, outside the shared window from {SHARED_BASE:#x} to {SHARED_END:#x}"
    )]
    SharedPage(u64),
    /// A page that must be there once.
    #[error("image has {count} {what} pages, one is needed")]
    Special {
        /// Which.
        what: &'static str,
        /// How many there are.
        count: usize,
    },
    /// The C-bit is elsewhere.
    #[error(
        "image is built for C-bit {image}, this platform's is {platform}: build it with coffer-image build --c-bit {platform}"
    )]
    CBit {
        /// In the image's page tables.
        image: u32,
        /// Here.
        platform: u32,
    },
}

/// Bytes that lie somewhere before the guest runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// Guest physical address.
    pub gpa: u64,
    /// What.
    pub source: Source,
}

/// Where bytes come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A range of the image file: offset and bytes.
    File(u64, u64),
    /// These.
    Bytes(Vec<u8>),
}

/// One LAUNCH_UPDATE: pages of one type, side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Update {
    /// First page's address.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// How they are launched.
    pub kind: PageType,
}

/// An image's signed identity as the firmware takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// ID_BLOCK.
    pub block: [u8; ID_BLOCK],
    /// ID_AUTH.
    pub auth: Box<[u8; ID_AUTH]>,
    /// An author's key is in it.
    pub author: bool,
}

/// What the caller decides.
#[derive(Clone, Debug)]
pub struct Options<'a> {
    /// RAM, `(first address, bytes)`, sorted.
    pub ram: &'a [(u64, u64)],
    /// Processors.
    pub vcpus: u32,
    /// In place of the image's policy.
    pub policy: Option<u64>,
    /// HOST_DATA of reports.
    pub host_data: [u8; 32],
    /// Position of this platform's C-bit.
    pub c_bit: u32,
}

/// Everything that a launch does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaunchPlan {
    /// Guest policy.
    pub policy: u64,
    /// The first processor's state.
    pub vmsa: Vmsa,
    /// Contents of pages to be launched, written to shared memory first.
    pub writes: Vec<Write>,
    /// Contents of the shared window.
    pub shared: Vec<Write>,
    /// Bytes of the shared window, from its base.
    pub window: u64,
    /// In order.
    pub updates: Vec<Update>,
    /// Address of the CPUID page, whose contents are the VMM's.
    pub cpuid: u64,
    /// Signed identity.
    pub identity: Option<Identity>,
    /// HOST_DATA.
    pub host_data: [u8; 32],
}

impl LaunchPlan {
    /// Pages that are launched, VMSAs not counted.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.updates.iter().map(|u| u.size / PAGE).sum()
    }

    /// Commands from LAUNCH_START to LAUNCH_FINISH.
    #[must_use]
    pub fn commands(&self) -> usize {
        self.updates.len() + 2
    }
}

/// Checks and plans.
///
/// # Errors
/// [`PlanError`], naming the page or the register.
pub fn plan(image: &Image, file: &[u8], options: &Options<'_>) -> Result<LaunchPlan, PlanError> {
    let policy = options.policy.or(image.snp.policy).ok_or(PlanError::NoPolicy)?;
    check_policy(policy)?;
    let vmsa = vmsa(image, file, options.c_bit)?;
    let mut building = Building::new(options);
    let mut areas = Areas::new(options.ram, options.vcpus, file);
    for directive in &image.directives {
        match *directive {
            Directive::Page(page) if page.shared => building.shared(page.gpa, page.offset)?,
            Directive::Page(page) => {
                let kind = match (page.kind, page.unmeasured) {
                    (PageKind::Secrets, _) => PageType::Secrets,
                    (PageKind::Cpuid, _) => PageType::Cpuid,
                    (PageKind::Normal, true) => PageType::Unmeasured,
                    (PageKind::Normal, false) => PageType::Normal,
                };
                let source = page.offset.map(|offset| Source::File(offset, PAGE));
                building.private(page.gpa, PAGE, kind, source)?;
            }
            Directive::Required { gpa, size } => building.in_ram("required memory", gpa, size)?,
            _ => {
                if let Some((gpa, bytes)) = areas.take(directive)? {
                    let size = bytes.len() as u64;
                    building.private(gpa, size, PageType::Unmeasured, Some(Source::Bytes(bytes)))?;
                }
            }
        }
    }
    let Building { writes, shared, window, updates, used, .. } = building;
    launch::check_apart(used)?;
    let one = |what, kind| match updates.iter().filter(|u: &&Update| u.kind == kind).collect::<Vec<_>>()[..] {
        [Update { gpa, size: PAGE, .. }] => Ok(*gpa),
        ref some => {
            Err(PlanError::Special { what, count: some.iter().map(|u| (u.size / PAGE) as usize).sum() })
        }
    };
    let cpuid = one("CPUID", PageType::Cpuid)?;
    one("secrets", PageType::Secrets)?;
    let plan = LaunchPlan {
        policy,
        vmsa,
        writes,
        shared,
        window,
        updates,
        cpuid,
        identity: image.snp.id_block.as_ref().map(|id| identity(id, policy)),
        host_data: options.host_data,
    };
    match (plan.pages(), plan.commands()) {
        (pages, _) if pages > PAGES_MAX => Err(PlanError::TooManyPages(pages)),
        (_, commands) if commands > COMMANDS_MAX => Err(PlanError::TooManyCommands(commands)),
        _ => Ok(plan),
    }
}

fn check_policy(policy: u64) -> Result<(), PlanError> {
    let problem = if policy & policy::ONE == 0 || policy & policy::SMT == 0 {
        "bits 16 (SMT) and 17 (always one) must be set: KVM refuses it otherwise"
    } else if policy & policy::SINGLE_SOCKET != 0 {
        "bit 20 (single socket) is not supported by KVM"
    } else if policy & !policy::KNOWN != 0 {
        "it has bits that KVM does not know"
    } else {
        return Ok(());
    };
    Err(PlanError::Policy { policy, problem })
}

fn vmsa(image: &Image, file: &[u8], c_bit: u32) -> Result<Vmsa, PlanError> {
    let page = image.snp.vmsa.ok_or(PlanError::NoVmsa)?;
    if page.gpa != VMSA_GPA || !page.is_last {
        let order = if page.is_last { "last" } else { "before other pages" };
        return Err(PlanError::VmsaPlace { gpa: page.gpa, order });
    }
    let bytes = file.get(page.offset as usize..).and_then(|b| b.first_chunk()).ok_or(PlanError::NoVmsa)?;
    let vmsa = Vmsa::new(*bytes);
    vmsa.check_importable()?;
    // Above the addresses that a guest's page tables may have is nothing but the C-bit.
    let high = vmsa.cr3() >> 32;
    if high != 1 << (c_bit - 32) {
        return Err(PlanError::CBit {
            image: high.checked_ilog2().map_or(0, |bit| bit + 32),
            platform: c_bit,
        });
    }
    Ok(vmsa)
}

struct Building<'a> {
    options: &'a Options<'a>,
    writes: Vec<Write>,
    shared: Vec<Write>,
    window: u64,
    updates: Vec<Update>,
    used: Vec<(u64, u64)>,
}

impl<'a> Building<'a> {
    fn new(options: &'a Options<'a>) -> Self {
        Self { options, writes: vec![], shared: vec![], window: PAGE, updates: vec![], used: vec![] }
    }

    fn in_ram(&self, what: &'static str, gpa: u64, size: u64) -> Result<(), PlanError> {
        let holds = |(start, length): &(u64, u64)| {
            gpa >= *start && gpa.checked_add(size).is_some_and(|end| end <= start + length)
        };
        if self.options.ram.iter().any(holds) {
            Ok(())
        } else {
            Err(LaunchError::NotRam { what, gpa, size }.into())
        }
    }

    fn private(
        &mut self,
        gpa: u64,
        size: u64,
        kind: PageType,
        source: Option<Source>,
    ) -> Result<(), PlanError> {
        self.in_ram("a private page", gpa, size)?;
        self.used.push((gpa, size));
        // An empty page is a page of zeros that is measured as such: memory is zero.
        if let Some(source) = source {
            join(&mut self.writes, gpa, source);
        }
        match self.updates.last_mut() {
            Some(last) if last.kind == kind && last.gpa + last.size == gpa => last.size += size,
            _ => self.updates.push(Update { gpa, size, kind }),
        }
        Ok(())
    }

    fn shared(&mut self, gpa: u64, offset: Option<u64>) -> Result<(), PlanError> {
        if !(SHARED_BASE..SHARED_END).contains(&gpa) {
            return Err(PlanError::SharedPage(gpa));
        }
        self.used.push((gpa, PAGE));
        self.window = self.window.max(gpa + PAGE - SHARED_BASE);
        if let Some(offset) = offset {
            join(&mut self.shared, gpa, Source::File(offset, PAGE));
        }
        Ok(())
    }
}

/// Appends a write; pages that lie side by side in the guest and in the file become one.
fn join(writes: &mut Vec<Write>, gpa: u64, source: Source) {
    if let (Some(Write { gpa: before, source: Source::File(offset, size) }), Source::File(next, more)) =
        (writes.last_mut(), &source)
        && *before + *size == gpa
        && *offset + *size == *next
    {
        *size += more;
        return;
    }
    writes.push(Write { gpa, source });
}

/// ID_BLOCK and ID_AUTH (AMD 56860, tables 75 and 76) from an image's header.
fn identity(id: &IdBlock, policy: u64) -> Identity {
    let mut block = [0; ID_BLOCK];
    block[..48].copy_from_slice(&id.digest);
    block[48..80].copy_from_slice(&id.ids);
    let [version, security_version, id_algorithm, author_algorithm] = id.numbers;
    block[80..84].copy_from_slice(&version.to_le_bytes());
    block[84..88].copy_from_slice(&security_version.to_le_bytes());
    block[88..].copy_from_slice(&policy.to_le_bytes());
    let mut auth = Box::new([0; ID_AUTH]);
    auth[..4].copy_from_slice(&id_algorithm.to_le_bytes());
    auth[4..8].copy_from_slice(&author_algorithm.to_le_bytes());
    // In the header: a signature of 144 bytes, a key of 152 whose second word is reserved; twice.
    for (from, to_signature, to_key) in [(0, 0x40, 0x240), (296, 0x680, 0x880)] {
        let (signature, key) = (&id.keys[from..from + 144], &id.keys[from + 144..from + 296]);
        auth[to_signature..to_signature + 144].copy_from_slice(signature);
        auth[to_key..to_key + 4].copy_from_slice(&key[..4]);
        auth[to_key + 4..to_key + 148].copy_from_slice(&key[8..]);
    }
    Identity { block, auth, author: id.author }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::igvm::{Page, Snp, VmsaPage};

    pub(crate) const RAM: [(u64, u64); 1] = [(0, 64 << 20)];

    pub(crate) fn page(gpa: u64, kind: PageKind, offset: Option<u64>) -> Directive {
        Directive::Page(Page { gpa, offset, shared: false, unmeasured: false, kind })
    }

    pub(crate) fn shared(gpa: u64, offset: u64) -> Directive {
        Directive::Page(Page {
            gpa,
            offset: Some(offset),
            shared: true,
            unmeasured: false,
            kind: PageKind::Normal,
        })
    }

    /// A file whose first page is the VMSA and whose next three are 1, 2 and 3.
    pub(crate) fn file() -> Vec<u8> {
        let mut file = crate::tee::snp::vmsa::tests::startable().to_vec();
        for fill in 1..4 {
            file.extend([fill; PAGE as usize]);
        }
        file
    }

    pub(crate) fn image() -> Image {
        let directives = vec![
            Directive::Area { index: 0, size: PAGE, initial: None },
            page(0x8000, PageKind::Secrets, None),
            page(0x9000, PageKind::Cpuid, None),
            Directive::Insert { gpa: 0xa000, area: 0 },
            page(0xb000, PageKind::Normal, Some(PAGE)),
            page(0xc000, PageKind::Normal, Some(2 * PAGE)),
            page(0xd000, PageKind::Normal, None),
            shared(SHARED_BASE + PAGE, 3 * PAGE),
        ];
        let vmsa = Some(VmsaPage { gpa: VMSA_GPA, offset: 0, is_last: true });
        Image { directives, registers: None, snp: Snp { policy: Some(0x30000), vmsa, id_block: None } }
    }

    pub(crate) fn options() -> Options<'static> {
        Options { ram: &RAM, vcpus: 1, policy: None, host_data: [7; 32], c_bit: 47 }
    }

    fn refused(change: impl FnOnce(&mut Image, &mut Options<'static>)) -> PlanError {
        let (mut image, mut options) = (image(), options());
        change(&mut image, &mut options);
        plan(&image, &file(), &options).unwrap_err()
    }

    #[test]
    fn pages_are_launched_in_file_order_with_neighbours_joined() {
        let plan = plan(&image(), &file(), &options()).unwrap();
        let updates: Vec<_> = plan.updates.iter().map(|u| (u.gpa, u.size / PAGE, u.kind)).collect();
        assert_eq!(
            updates,
            [
                (0x8000, 1, PageType::Secrets),
                (0x9000, 1, PageType::Cpuid),
                (0xa000, 1, PageType::Unmeasured),
                (0xb000, 3, PageType::Normal)
            ]
        );
        assert_eq!((plan.pages(), plan.commands(), plan.window), (6, 6, 2 * PAGE));
        assert_eq!(plan.shared, [Write { gpa: SHARED_BASE + PAGE, source: Source::File(3 * PAGE, PAGE) }]);
        assert!(plan.writes.contains(&Write { gpa: 0xb000, source: Source::File(PAGE, 2 * PAGE) }));
        assert_eq!(plan.cpuid, 0x9000);
    }

    #[test]
    fn what_kvm_would_measure_otherwise_is_refused() {
        assert!(matches!(
            refused(|i, _| i.snp.vmsa.as_mut().unwrap().is_last = false),
            PlanError::VmsaPlace { order: "before other pages", .. }
        ));
        assert!(matches!(
            refused(|i, _| i.snp.vmsa.as_mut().unwrap().gpa = 0x1000),
            PlanError::VmsaPlace { gpa: 0x1000, .. }
        ));
        assert_eq!(refused(|i, _| i.snp.vmsa = None), PlanError::NoVmsa);
        assert_eq!(refused(|_, o| o.c_bit = 51), PlanError::CBit { image: 47, platform: 51 });
    }

    #[test]
    fn policies_that_kvm_refuses_are_refused_first() {
        assert_eq!(refused(|i, _| i.snp.policy = None), PlanError::NoPolicy);
        for policy in [0, 0x10000, 0x20000, 0x130000, 0x230000] {
            let error = refused(|_, o| o.policy = Some(policy));
            assert!(matches!(error, PlanError::Policy { .. }), "{policy:#x}");
        }
    }

    #[test]
    fn pages_in_the_wrong_place_twice_or_too_many_are_refused() {
        let add = |directive| refused(move |i, _| i.directives.push(directive));
        assert_eq!(add(shared(0x10_0000, PAGE)), PlanError::SharedPage(0x10_0000));
        assert_eq!(add(shared(SHARED_END, PAGE)), PlanError::SharedPage(SHARED_END));
        assert!(matches!(
            add(page(64 << 20, PageKind::Normal, None)),
            PlanError::Layout(LaunchError::NotRam { .. })
        ));
        assert!(matches!(
            add(page(0xb000, PageKind::Normal, None)),
            PlanError::Layout(LaunchError::Overlap { .. })
        ));
        assert_eq!(
            add(page(0x3_0000, PageKind::Cpuid, None)),
            PlanError::Special { what: "CPUID", count: 2 }
        );
        let many = |count: u64| {
            refused(move |i, _| {
                let pages = (0..count).map(|n| page(0x10_0000 + n * PAGE, PageKind::Normal, None));
                i.directives.extend(pages);
            })
        };
        assert_eq!(many(19), PlanError::TooManyPages(25));
        let scattered = refused(|i, _| {
            i.directives.retain(|d| !matches!(d, Directive::Page(p) if p.gpa == 0xc000 || p.gpa == 0xd000));
            let pages = (0..19).map(|n| page(0x10_0000 + n * 2 * PAGE, PageKind::Normal, None));
            i.directives.extend(pages);
        });
        assert_eq!(scattered, PlanError::TooManyCommands(25));
    }

    #[test]
    fn the_identity_lies_where_the_firmware_reads_it() {
        let id = IdBlock {
            author: true,
            digest: [1; 48],
            ids: [2; 32],
            numbers: [3, 4, 5, 6],
            keys: std::array::from_fn(|i| (i / 8) as u8),
        };
        let Identity { block, auth, author } = identity(&id, 0x30000);
        assert!(author);
        assert_eq!((block[0], block[48], block[80], block[84], block[90]), (1, 2, 3, 4, 3));
        assert_eq!((auth[0], auth[4]), (5, 6));
        assert_eq!((auth[0x40], auth[0x40 + 143], auth[0x240], auth[0x244]), (0, 17, 18, 19));
        assert_eq!((auth[0x680], auth[0x680 + 143], auth[0x880], auth[0x884]), (37, 54, 55, 56));
    }
}
