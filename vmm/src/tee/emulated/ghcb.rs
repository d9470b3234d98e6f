//! The GHCB protocol, version 2 (AMD 56421), on the hypervisor's side: messages in the MSR, and exits with a page.
//!
//! Owns: decoding and encoding. Does not own: what a request does, which is behind [`Hypervisor`]. The page is the guest's:
//! it is copied once, decided on, and written back once.

use coffer_layout::{PAGE, snp};

/// Features that this hypervisor offers: SEV-SNP and AP creation.
pub const FEATURES: u64 = 3;
/// Where the GHCB's buffer begins and how long it is, in bytes.
pub const BUFFER: (usize, usize) = (0x800, 0x7f0);
const VERSION: u64 = 2;
/// Most entries of one page state change request.
const CHANGES_MAX: u16 = 253;

/// Exit codes (SW_EXITCODE).
#[expect(missing_docs, reason = "the names are the protocol's")]
pub mod exit {
    pub const CPUID: u64 = 0x72;
    pub const IOIO: u64 = 0x7b;
    pub const MSR: u64 = 0x7c;
    pub const WBINVD: u64 = 0x89;
    pub const MMIO_READ: u64 = 0x8000_0001;
    pub const MMIO_WRITE: u64 = 0x8000_0002;
    pub const NMI_COMPLETE: u64 = 0x8000_0003;
    pub const AP_RESET_HOLD: u64 = 0x8000_0004;
    pub const PAGE_STATE_CHANGE: u64 = 0x8000_0010;
    pub const GUEST_REQUEST: u64 = 0x8000_0011;
    pub const EXTENDED_GUEST_REQUEST: u64 = 0x8000_0012;
    pub const AP_CREATION: u64 = 0x8000_0013;
    pub const HYPERVISOR_FEATURES: u64 = 0x8000_fffd;
    pub const TERMINATION: u64 = 0x8000_fffe;
}

/// Name of an exit code, for the trace.
#[must_use]
pub fn exit_name(code: u64) -> &'static str {
    match code {
        exit::CPUID => "cpuid",
        exit::IOIO => "io",
        exit::MSR => "msr",
        exit::WBINVD => "wbinvd",
        exit::MMIO_READ => "mmio-read",
        exit::MMIO_WRITE => "mmio-write",
        exit::NMI_COMPLETE => "nmi-complete",
        exit::AP_RESET_HOLD => "ap-reset-hold",
        exit::PAGE_STATE_CHANGE => "page-state-change",
        exit::GUEST_REQUEST => "guest-request",
        exit::EXTENDED_GUEST_REQUEST => "extended-guest-request",
        exit::AP_CREATION => "ap-creation",
        exit::HYPERVISOR_FEATURES => "hypervisor-features",
        exit::TERMINATION => "termination",
        _ => "unknown",
    }
}

/// What a request does. An `Err` ends the machine.
pub trait Hypervisor {
    /// Why the machine ends.
    type End;

    /// CPUID: eax, ebx, ecx, edx.
    fn cpuid(&mut self, leaf: u32, index: u32) -> [u32; 4];
    /// Changes pages' state; `private` is the new one. `pages` are of 4 KiB.
    ///
    /// # Errors
    /// A change that must not happen.
    fn change(&mut self, page: u64, pages: u64, private: bool) -> Result<(), Self::End>;
    /// A port is written.
    ///
    /// # Errors
    /// The write ends the machine.
    fn port_write(&mut self, port: u16, bytes: &[u8]) -> Result<(), Self::End>;
    /// A port is read.
    fn port_read(&mut self, port: u16, bytes: &mut [u8]);
    /// Device memory is written.
    fn mmio_write(&mut self, address: u64, bytes: &[u8]);
    /// Device memory is read.
    fn mmio_read(&mut self, address: u64, bytes: &mut [u8]);
    /// Starts a processor from a VMSA page. False when that cannot be.
    ///
    /// # Errors
    /// The page is none.
    fn create_processor(&mut self, apic_id: u32, vmsa: u64) -> Result<bool, Self::End>;
    /// A message to the security processor: addresses of request and response; for an extended request also where
    /// certificates go, and how many pages there are for them.
    ///
    /// # Errors
    /// The addresses are not the guest's to give.
    fn guest_request(
        &mut self,
        request: u64,
        response: u64,
        certificates: Option<(u64, u64)>,
    ) -> Result<Answer, Self::End>;
    /// The guest gives up: reason set and code.
    fn terminated(&mut self, set: u8, code: u8) -> Self::End;
    /// The GHCB is not where the guest may have it, or breaks the protocol.
    fn broken(&mut self, words: String) -> Self::End;
}

/// What became of a message to the security processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The firmware's status; 0 is success.
    Status(u32),
    /// There is no room for the certificates; so many pages are needed.
    Room(u64),
    /// The hypervisor cannot.
    Failed,
}

/// Answers a message of the MSR protocol: the value that the guest reads back. `registered` becomes the GHCB's address.
///
/// # Errors
/// The guest gives up, or asks for what must not be.
pub fn message<H: Hypervisor>(
    value: u64,
    registered: &mut Option<u64>,
    host: &mut H,
    c_bit: u32,
) -> Result<u64, H::End> {
    match value & 0xfff {
        // SEV information: highest and lowest version, C-bit.
        0x002 => Ok(VERSION << 48 | VERSION << 32 | u64::from(c_bit) << 24 | 0x001),
        0x004 => {
            let (leaf, register) = ((value >> 32) as u32, value >> 30 & 3);
            let words = host.cpuid(leaf, 0);
            Ok(u64::from(words[register as usize]) << 32 | register << 30 | 0x005)
        }
        // No preferred address.
        0x010 => Ok(!0xfff | 0x011),
        0x012 => {
            let address = value & !0xfff;
            *registered = Some(address);
            Ok(address | 0x013)
        }
        0x014 => {
            let (page, operation) = (value >> 12 & 0xff_ffff_ffff, value >> 52 & 0xf);
            match operation {
                1 | 2 => host.change(page, 1, operation == 1)?,
                _ => return Ok(1 << 32 | 0x015),
            }
            Ok(0x015)
        }
        0x080 => Ok(FEATURES << 12 | 0x081),
        0x100 => match snp::terminated(value) {
            Some((set, code)) => Err(host.terminated(set, code)),
            None => Err(host.broken(format!("GHCB MSR {value:#x}"))),
        },
        _ => Err(host
            .broken(format!("the guest sent the MSR message {value:#x}, which the protocol does not have"))),
    }
}

/// A copy of the guest's GHCB page.
pub struct Ghcb {
    bytes: Box<[u8; PAGE as usize]>,
    c_bit: u32,
}

mod at {
    pub(super) const RAX: usize = 0x1f8;
    pub(super) const RCX: usize = 0x308;
    pub(super) const RDX: usize = 0x310;
    pub(super) const RBX: usize = 0x318;
    pub(super) const EXIT_CODE: usize = 0x390;
    pub(super) const INFO_1: usize = 0x398;
    pub(super) const INFO_2: usize = 0x3a0;
    pub(super) const SCRATCH: usize = 0x3a8;
    pub(super) const VALID: usize = 0x3f0;
    pub(super) const VERSION: usize = 0xffa;
    pub(super) const USAGE: usize = 0xffc;
}

/// SW_EXITINFO1: the request is malformed; SW_EXITINFO2 says how.
const MALFORMED: u64 = 2;
const BAD_INPUT: u64 = 5;
const MISSING_INPUT: u64 = 3;
const UNKNOWN_EVENT: u64 = 6;
const BAD_BUFFER: u64 = 4;

/// Why a request is malformed.
struct Malformed(u64);

enum Stop<E> {
    Malformed(u64),
    End(E),
}

impl<E> From<Malformed> for Stop<E> {
    fn from(malformed: Malformed) -> Self {
        Self::Malformed(malformed.0)
    }
}

impl Ghcb {
    /// A page that was copied from the guest.
    #[must_use]
    pub fn new(bytes: [u8; PAGE as usize], c_bit: u32) -> Self {
        Self { bytes: Box::new(bytes), c_bit }
    }

    /// The page as it goes back.
    #[must_use]
    pub fn bytes(&self) -> &[u8; PAGE as usize] {
        &self.bytes
    }

    /// SW_EXITCODE.
    #[must_use]
    pub fn exit_code(&self) -> u64 {
        self.word(at::EXIT_CODE)
    }

    fn word(&self, at: usize) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|i| self.bytes[at + i]))
    }

    fn number(&self, at: usize, bytes: usize) -> u64 {
        (0..bytes).fold(0, |value, i| value | u64::from(self.bytes[at + i]) << (8 * i))
    }

    fn is_valid(&self, at: usize) -> bool {
        self.bytes[at::VALID + at / 64] >> (at / 8 % 8) & 1 != 0
    }

    fn get(&self, at: usize) -> Result<u64, Malformed> {
        if self.is_valid(at) { Ok(self.word(at)) } else { Err(Malformed(MISSING_INPUT)) }
    }

    fn put(&mut self, at: usize, value: u64) {
        self.bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        self.bytes[at::VALID + at / 64] |= 1 << (at / 8 % 8);
    }

    /// Answers the request in the page. `gpa` is the page's address.
    ///
    /// # Errors
    /// The machine ends.
    pub fn answer<H: Hypervisor>(&mut self, gpa: u64, host: &mut H) -> Result<(), H::End> {
        if self.number(at::USAGE, 4) != 0 || !(1..=VERSION).contains(&self.number(at::VERSION, 2)) {
            return Err(host
                .broken(format!("the GHCB at {gpa:#x} has another version or use than this hypervisor's")));
        }
        let (info_1, info_2) = match self.request(gpa, host) {
            Ok(answer) => answer,
            Err(Stop::Malformed(reason)) => (MALFORMED, reason),
            Err(Stop::End(end)) => return Err(end),
        };
        self.put(at::INFO_1, info_1);
        self.put(at::INFO_2, info_2);
        Ok(())
    }

    fn request<H: Hypervisor>(&mut self, gpa: u64, host: &mut H) -> Result<(u64, u64), Stop<H::End>> {
        let (code, info_1, info_2) = (self.get(at::EXIT_CODE)?, self.get(at::INFO_1)?, self.get(at::INFO_2)?);
        match code {
            exit::CPUID => {
                let (leaf, index) = (self.get(at::RAX)? as u32, self.get(at::RCX)? as u32);
                let words = host.cpuid(leaf, index);
                for (at, word) in [at::RAX, at::RBX, at::RCX, at::RDX].into_iter().zip(words) {
                    self.put(at, word.into());
                }
            }
            exit::IOIO => self.port(gpa, info_1, host)?,
            // Linux asks for MSRs only through #VC, which does not happen here.
            exit::MSR => return Err(Stop::Malformed(BAD_INPUT)),
            exit::WBINVD | exit::NMI_COMPLETE => {}
            exit::MMIO_READ | exit::MMIO_WRITE => {
                let length = usize::try_from(info_2).ok().filter(|n| matches!(n, 1 | 2 | 4 | 8));
                let length = length.ok_or(Malformed(BAD_INPUT))?;
                let at = self.buffer(gpa, length)?;
                if code == exit::MMIO_READ {
                    host.mmio_read(info_1, &mut self.bytes[at..at + length]);
                } else {
                    host.mmio_write(info_1, &self.bytes[at..at + length]);
                }
            }
            exit::PAGE_STATE_CHANGE => self.change(gpa, host)?,
            exit::GUEST_REQUEST | exit::EXTENDED_GUEST_REQUEST => {
                let extended = code == exit::EXTENDED_GUEST_REQUEST;
                let certificates =
                    if extended { Some((self.get(at::RAX)?, self.get(at::RBX)?)) } else { None };
                let answer = host.guest_request(info_1, info_2, certificates).map_err(Stop::End)?;
                // The upper half is the hypervisor's error, the lower the firmware's.
                return Ok(match answer {
                    Answer::Status(status) => (0, status.into()),
                    Answer::Room(pages) => {
                        self.put(at::RBX, pages);
                        (0, 1 << 32)
                    }
                    Answer::Failed => (0, 2 << 32),
                });
            }
            exit::AP_CREATION => {
                let (operation, vmpl) = (info_1 & 0xffff, info_1 >> 16 & 0xf);
                if operation != 1 || vmpl != 0 {
                    return Err(Stop::Malformed(BAD_INPUT));
                }
                let features = self.get(at::RAX)?;
                let apic_id = (info_1 >> 32) as u32;
                if features != 1 || !host.create_processor(apic_id, info_2).map_err(Stop::End)? {
                    return Err(Stop::Malformed(BAD_INPUT));
                }
            }
            exit::HYPERVISOR_FEATURES => return Ok((0, FEATURES)),
            exit::TERMINATION => {
                return Err(Stop::End(host.terminated((info_1 & 0xf) as u8, info_2 as u8)));
            }
            _ => return Err(Stop::Malformed(UNKNOWN_EVENT)),
        }
        Ok((0, 0))
    }

    /// Offset in the page of a buffer of `length` bytes at the scratch address.
    fn buffer(&self, gpa: u64, length: usize) -> Result<usize, Malformed> {
        let offset = self.get(at::SCRATCH)?.checked_sub(gpa).and_then(|o| usize::try_from(o).ok());
        let (start, size) = BUFFER;
        match offset.and_then(|at| Some((at, at.checked_add(length)?))) {
            Some((at, end)) if at >= start && end <= start + size => Ok(at),
            _ => Err(Malformed(BAD_BUFFER)),
        }
    }

    /// IN and OUT (AMD APM volume 2, 15.10.2): bit 0 is IN, 2 string, 3 repeated, 4 to 6 the size, 16 up the port.
    fn port<H: Hypervisor>(&mut self, gpa: u64, info: u64, host: &mut H) -> Result<(), Stop<H::End>> {
        let length = match info >> 4 & 7 {
            1 => 1,
            2 => 2,
            4 => 4,
            _ => return Err(Stop::Malformed(BAD_INPUT)),
        };
        let (port, read) = ((info >> 16 & 0xffff) as u16, info & 1 != 0);
        if info & 4 == 0 {
            let mut bytes = self.get(at::RAX)?.to_le_bytes();
            if read {
                bytes = [0; 8];
                host.port_read(port, &mut bytes[..length]);
                self.put(at::RAX, u64::from_le_bytes(bytes));
                return Ok(());
            }
            return host.port_write(port, &bytes[..length]).map_err(Stop::End);
        }
        let count = self.word(at::INFO_2);
        let total = usize::try_from(count).ok().and_then(|n| n.checked_mul(length));
        let total = total.filter(|n| *n <= BUFFER.1).ok_or(Malformed(BAD_INPUT))?;
        let start = self.buffer(gpa, total)?;
        for at in (start..start + total).step_by(length) {
            if read {
                host.port_read(port, &mut self.bytes[at..at + length]);
            } else {
                host.port_write(port, &self.bytes[at..at + length]).map_err(Stop::End)?;
            }
        }
        Ok(())
    }

    /// Header: current and last entry, u16 each, 4 bytes reserved; entries: current page 0-11, page number 12-51,
    /// operation 52-55, 2 MiB 56.
    fn change<H: Hypervisor>(&mut self, gpa: u64, host: &mut H) -> Result<(), Stop<H::End>> {
        let start = self.buffer(gpa, 8)?;
        let (current, last) = (self.number(start, 2) as u16, self.number(start + 2, 2) as u16);
        if last >= CHANGES_MAX || current > last || self.buffer(gpa, 8 + 8 * (usize::from(last) + 1)).is_err()
        {
            return Err(Stop::Malformed(BAD_BUFFER));
        }
        for index in current..=last {
            let entry = self.word(start + 8 + 8 * usize::from(index));
            let pages = if entry >> 56 & 1 != 0 { 512 } else { 1 };
            let (page, operation) = (entry >> 12 & 0xff_ffff_ffff, entry >> 52 & 0xf);
            if !matches!(operation, 1 | 2) || !page.is_multiple_of(pages) {
                return Err(Stop::Malformed(BAD_INPUT));
            }
            host.change(page, pages, operation == 1).map_err(Stop::End)?;
            self.bytes[start..start + 2].copy_from_slice(&(index + 1).to_le_bytes());
        }
        Ok(())
    }

    /// The C-bit that the hypervisor reports.
    #[must_use]
    pub fn c_bit(&self) -> u32 {
        self.c_bit
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Addresses of request, response, and certificates with their room.
    type Request = (u64, u64, Option<(u64, u64)>);

    /// Writes down what is asked.
    #[derive(Debug, Default)]
    pub(crate) struct Recorder {
        pub(crate) changes: Vec<(u64, u64, bool)>,
        ports: Vec<(u16, Vec<u8>)>,
        mmio: Vec<(u64, Vec<u8>)>,
        created: Vec<(u32, u64)>,
        requests: Vec<Request>,
    }

    impl Hypervisor for Recorder {
        type End = String;

        fn cpuid(&mut self, leaf: u32, index: u32) -> [u32; 4] {
            [leaf, index, 3, 4]
        }
        fn change(&mut self, page: u64, pages: u64, private: bool) -> Result<(), String> {
            self.changes.push((page, pages, private));
            Ok(())
        }
        fn port_write(&mut self, port: u16, bytes: &[u8]) -> Result<(), String> {
            self.ports.push((port, bytes.to_vec()));
            Ok(())
        }
        fn port_read(&mut self, port: u16, bytes: &mut [u8]) {
            bytes.fill(port as u8);
        }
        fn mmio_write(&mut self, address: u64, bytes: &[u8]) {
            self.mmio.push((address, bytes.to_vec()));
        }
        fn mmio_read(&mut self, _: u64, bytes: &mut [u8]) {
            bytes.fill(0x55);
        }
        fn create_processor(&mut self, apic_id: u32, vmsa: u64) -> Result<bool, String> {
            self.created.push((apic_id, vmsa));
            Ok(true)
        }
        fn guest_request(&mut self, a: u64, b: u64, c: Option<(u64, u64)>) -> Result<Answer, String> {
            self.requests.push((a, b, c));
            Ok(if c == Some((0x9000, 0)) { Answer::Room(3) } else { Answer::Status(0) })
        }
        fn terminated(&mut self, set: u8, code: u8) -> String {
            format!("terminated {set} {code}")
        }
        fn broken(&mut self, words: String) -> String {
            words
        }
    }

    const AT: u64 = 0xc000_0000;

    /// A page with fields that are marked valid.
    fn page(fields: &[(usize, u64)]) -> Ghcb {
        let mut ghcb = Ghcb::new([0; PAGE as usize], 47);
        ghcb.bytes[at::VERSION] = 2;
        for (at, value) in [(at::INFO_1, 0), (at::INFO_2, 0)].iter().chain(fields) {
            ghcb.put(*at, *value);
        }
        ghcb
    }

    fn info(ghcb: &Ghcb) -> (u64, u64) {
        (ghcb.word(at::INFO_1), ghcb.word(at::INFO_2))
    }

    #[test]
    fn the_msr_protocol_answers_as_the_specification_says() {
        let (mut host, mut registered) = (Recorder::default(), None);
        let mut ask = |value| message(value, &mut registered, &mut host, 47);
        assert_eq!(ask(0x002), Ok(0x0002_0002_2f00_0001));
        assert_eq!(ask(0x8000_001f << 32 | 1 << 30 | 4), Ok(0x4000_0005));
        assert_eq!(ask(0x8000_001f << 32 | 4), Ok(0x8000_001f_0000_0005));
        assert_eq!(ask(0x1234_5012), Ok(0x1234_5013));
        assert_eq!(ask(0x080), Ok(0x3081));
        assert_eq!(ask(2 << 52 | 0x77_7000 | 0x14), Ok(0x015));
        assert_eq!(ask(3 << 52 | 0x77_7000 | 0x14), Ok(0x1_0000_0015));
        assert_eq!(ask(snp::termination(0x21)), Err("terminated 12 33".to_owned()));
        assert!(ask(0xabc).is_err());
        assert_eq!(registered, Some(0x1234_5000));
        assert_eq!(host.changes, [(0x777, 1, false)]);
    }

    #[test]
    fn ports_are_read_and_written_one_by_one_and_in_strings() {
        let mut host = Recorder::default();
        let mut out = page(&[(at::EXIT_CODE, exit::IOIO), (at::INFO_1, 0x80 << 16 | 0x10), (at::RAX, 0xc1)]);
        out.answer(AT, &mut host).unwrap();
        assert_eq!(host.ports, [(0x80, vec![0xc1])]);
        let mut inward = page(&[(at::EXIT_CODE, exit::IOIO), (at::INFO_1, 0x64 << 16 | 0x21), (at::RAX, 9)]);
        inward.answer(AT, &mut host).unwrap();
        assert_eq!(inward.word(at::RAX), 0x6464);
        let string = [
            (at::EXIT_CODE, exit::IOIO),
            (at::INFO_1, 0x80 << 16 | 0x1c),
            (at::INFO_2, 3),
            (at::SCRATCH, AT + 0x800),
        ];
        page(&string).answer(AT, &mut host).unwrap();
        assert_eq!(host.ports.len(), 4);
    }

    #[test]
    fn page_state_changes_are_done_in_order_and_leave_the_entry_behind_the_last() {
        let mut host = Recorder::default();
        let mut ghcb = page(&[(at::EXIT_CODE, exit::PAGE_STATE_CHANGE), (at::SCRATCH, AT + 0x800)]);
        ghcb.bytes[0x802] = 1;
        for (index, entry) in [1u64 << 52 | 0x5000, 2 << 52 | 1 << 56 | 0x40_0000].iter().enumerate() {
            let at = 0x808 + 8 * index;
            ghcb.bytes[at..at + 8].copy_from_slice(&entry.to_le_bytes());
        }
        ghcb.answer(AT, &mut host).unwrap();
        assert_eq!(host.changes, [(5, 1, true), (0x400, 512, false)]);
        assert_eq!((info(&ghcb), ghcb.bytes[0x800]), ((0, 0), 2));
    }

    #[test]
    fn requests_outside_the_page_or_without_their_fields_are_malformed() {
        let mut host = Recorder::default();
        for fields in [
            &[(at::EXIT_CODE, exit::IOIO), (at::INFO_1, 0x80 << 16 | 0x10)][..],
            &[(at::EXIT_CODE, exit::IOIO), (at::INFO_1, 0x80 << 16 | 0x30), (at::RAX, 1)],
            &[(at::EXIT_CODE, exit::PAGE_STATE_CHANGE), (at::SCRATCH, AT + 0xff0)],
            &[(at::EXIT_CODE, exit::PAGE_STATE_CHANGE), (at::SCRATCH, AT - 8)],
            &[(at::EXIT_CODE, exit::MMIO_READ), (at::INFO_2, 8), (at::SCRATCH, AT + 0xfec)],
            &[(at::EXIT_CODE, exit::MMIO_READ), (at::INFO_2, 3), (at::SCRATCH, AT + 0x800)],
            &[(at::EXIT_CODE, exit::AP_CREATION), (at::INFO_1, 1 << 16 | 1), (at::RAX, 1)],
            &[(at::EXIT_CODE, exit::AP_CREATION), (at::INFO_1, 1), (at::RAX, 3)],
            &[(at::EXIT_CODE, 0x1234)],
        ] {
            let mut ghcb = page(fields);
            ghcb.answer(AT, &mut host).unwrap();
            assert_eq!(info(&ghcb).0, MALFORMED, "{fields:x?}");
        }
        assert!(host.created.is_empty() && host.ports.is_empty() && host.changes.is_empty());
        let mut other = page(&[(at::EXIT_CODE, exit::WBINVD)]);
        other.bytes[at::USAGE] = 1;
        assert!(other.answer(AT, &mut host).is_err());
    }

    #[test]
    fn guest_requests_and_processors_reach_the_hypervisor() {
        let mut host = Recorder::default();
        let request = [(at::EXIT_CODE, exit::GUEST_REQUEST), (at::INFO_1, 0x1000), (at::INFO_2, 0x2000)];
        page(&request).answer(AT, &mut host).unwrap();
        let extended = [
            (at::EXIT_CODE, exit::EXTENDED_GUEST_REQUEST),
            (at::INFO_1, 0x1000),
            (at::INFO_2, 0x2000),
            (at::RAX, 0x9000),
            (at::RBX, 0),
        ];
        let mut ghcb = page(&extended);
        ghcb.answer(AT, &mut host).unwrap();
        assert_eq!((info(&ghcb), ghcb.word(at::RBX)), ((0, 1 << 32), 3));
        assert_eq!(host.requests, [(0x1000, 0x2000, None), (0x1000, 0x2000, Some((0x9000, 0)))]);
        let create = [
            (at::EXIT_CODE, exit::AP_CREATION),
            (at::INFO_1, 3 << 32 | 1),
            (at::INFO_2, 0x7000),
            (at::RAX, 1),
        ];
        page(&create).answer(AT, &mut host).unwrap();
        assert_eq!(host.created, [(3, 0x7000)]);
    }

    proptest! {
        #[test]
        fn no_page_and_no_message_panics(
            bytes in prop::collection::vec(any::<u8>(), PAGE as usize),
            code in prop::sample::select(vec![0x72, 0x7b, 0x7c, 0x8000_0001, 0x8000_0002, 0x8000_0010, 0x8000_0011, 0x8000_0012, 0x8000_0013, 0x8000_fffe]),
            scratch in 0u64..0x1100,
            info in any::<[u64; 2]>(),
            value in any::<u64>(),
        ) {
            let mut host = Recorder::default();
            let _ = message(value, &mut None, &mut host, 47);
            let mut ghcb = Ghcb::new(bytes.try_into().unwrap(), 47);
            let _ = ghcb.answer(AT, &mut host);
            ghcb.bytes[at::VERSION..].copy_from_slice(&[2, 0, 0, 0, 0, 0]);
            for (at, value) in [(at::EXIT_CODE, code), (at::SCRATCH, AT + scratch), (at::INFO_1, info[0]), (at::INFO_2, info[1] % 600), (at::RAX, value)] {
                ghcb.put(at, value);
            }
            let _ = ghcb.answer(AT, &mut host);
            prop_assert!(host.changes.len() <= 254 && host.ports.len() <= 2048);
        }
    }
}
