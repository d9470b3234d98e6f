//! From directives to a plan, and the plan's execution on a plain VM (`--tee none`).
//!
//! Owns: that everything is in RAM, nothing overlaps, every parameter fits. The plan is pure: it is made before any
//! system call, and executing it only copies.

use std::{
    fmt::Display,
    fs::File,
    io::{Seek, SeekFrom},
    os::unix::fs::FileExt,
};

use coffer_layout::{
    PAGE,
    boot::{COMMAND_LINE, COMMAND_LINE_MAX, MapEntry},
};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemory};

use crate::{
    igvm::{Directive, Image, ParameterKind, Registers},
    memory::{self, Ram},
};

/// Why an image cannot be launched in this guest.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum LaunchError {
    /// Something lies outside RAM.
    #[error("image loads {what} at {gpa:#x}, {size:#x} bytes, which is not RAM: raise --memory-mib")]
    NotRam {
        /// What.
        what: &'static str,
        /// Where.
        gpa: u64,
        /// Bytes.
        size: u64,
    },
    /// Two things at one place.
    #[error("image loads {gpa:#x} twice")]
    Overlap {
        /// Where.
        gpa: u64,
    },
    /// A parameter does not fit its area.
    #[error("image leaves {room} bytes for {what}, {needed} are needed")]
    Parameter {
        /// Which.
        what: &'static str,
        /// Bytes to write.
        needed: usize,
        /// Bytes there.
        room: usize,
    },
    /// No registers to start with.
    #[error("image has no native VP context: nothing says where to start")]
    NoContext,
    /// No room behind the kernel's command line.
    #[error("the image's command line has no room for {0:?}: use an image with a shorter one")]
    CommandLine(String),
    /// Guest memory refused a write that the plan had checked.
    #[error("load {gpa:#x}: {reason}")]
    Write {
        /// Where.
        gpa: u64,
        /// Why.
        reason: String,
    },
}

/// Bytes from the file into RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copy {
    /// Guest physical address.
    pub gpa: u64,
    /// Offset in the file.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// How often, one behind the other: the kernel's text ends in hundreds of pages of the same filling, which the file has once.
    pub times: u64,
}

impl Copy {
    /// Where it ends in the guest.
    fn end(&self) -> u64 {
        self.gpa + self.size * self.times
    }
}

/// Everything that a launch does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Runs of pages, neighbours joined.
    pub copies: Vec<Copy>,
    /// Parameter areas as they will be.
    pub areas: Vec<(u64, Vec<u8>)>,
    /// The first processor's state.
    pub registers: Registers,
}

/// Checks and plans.
///
/// # Errors
/// [`LaunchError`], naming the address.
pub fn plan(image: &Image, ram: &[(u64, u64)], vcpus: u32, file: &[u8]) -> Result<Plan, LaunchError> {
    let in_ram = |what, gpa: u64, size: u64| {
        let holds = |(start, length): &(u64, u64)| gpa >= *start && gpa + size <= start + length;
        if ram.iter().any(holds) { Ok(()) } else { Err(LaunchError::NotRam { what, gpa, size }) }
    };
    let (mut copies, mut used, mut areas) = (Vec::<Copy>::new(), Vec::<(u64, u64)>::new(), Vec::new());
    let mut open = Areas::new(ram, vcpus, file);
    for directive in &image.directives {
        match *directive {
            Directive::Page(page) => {
                in_ram("a page", page.gpa, PAGE)?;
                match used.last_mut() {
                    Some((start, size)) if *start + *size == page.gpa => *size += PAGE,
                    _ => used.push((page.gpa, PAGE)),
                }
                match (page.offset, copies.last_mut()) {
                    (Some(offset), Some(last))
                        if last.end() == page.gpa && last.times == 1 && last.offset + last.size == offset =>
                    {
                        last.size += PAGE;
                    }
                    (Some(offset), Some(last))
                        if last.end() == page.gpa && last.size == PAGE && last.offset == offset =>
                    {
                        last.times += 1;
                    }
                    (Some(offset), _) => copies.push(Copy { gpa: page.gpa, offset, size: PAGE, times: 1 }),
                    // RAM of a plain VM is zero.
                    (None, _) => {}
                }
            }
            Directive::Required { gpa, size } => in_ram("required memory", gpa, size)?,
            _ => {
                if let Some((gpa, bytes)) = open.take(directive)? {
                    in_ram("a parameter area", gpa, bytes.len() as u64)?;
                    used.push((gpa, bytes.len() as u64));
                    areas.push((gpa, bytes));
                }
            }
        }
    }
    check_apart(used)?;
    Ok(Plan { copies, areas, registers: image.registers.ok_or(LaunchError::NoContext)? })
}

/// Refuses ranges, `(first address, bytes)`, of which two overlap.
///
/// # Errors
/// [`LaunchError::Overlap`].
pub fn check_apart(mut ranges: Vec<(u64, u64)>) -> Result<(), LaunchError> {
    ranges.sort_unstable();
    match ranges.windows(2).find(|w| w[0].0 + w[0].1 > w[1].0) {
        Some(pair) => Err(LaunchError::Overlap { gpa: pair[1].0 }),
        None => Ok(()),
    }
}

/// Parameter areas between their first directive and the one that puts them into the guest.
pub struct Areas<'a> {
    buffers: Vec<(u32, Vec<u8>)>,
    ram: &'a [(u64, u64)],
    vcpus: u32,
    file: &'a [u8],
}

impl<'a> Areas<'a> {
    /// None are open.
    #[must_use]
    pub fn new(ram: &'a [(u64, u64)], vcpus: u32, file: &'a [u8]) -> Self {
        Self { buffers: Vec::new(), ram, vcpus, file }
    }

    /// Takes a directive that is about areas; the finished area and its address when it is inserted.
    ///
    /// # Errors
    /// [`LaunchError::Parameter`] when there is too little room.
    pub fn take(&mut self, directive: &Directive) -> Result<Option<(u64, Vec<u8>)>, LaunchError> {
        match *directive {
            Directive::Area { index, size, initial } => {
                let mut buffer = vec![0; size as usize];
                let bytes = |at: u64| self.file.get(at as usize..at as usize + size as usize);
                if let Some(bytes) = initial.and_then(bytes) {
                    buffer.copy_from_slice(bytes);
                }
                self.buffers.push((index, buffer));
            }
            Directive::Parameter { kind, area, offset } => {
                let (what, bytes) = match kind {
                    ParameterKind::VpCount => ("the number of processors", self.vcpus.to_le_bytes().to_vec()),
                    ParameterKind::MemoryMap => ("the memory map", memory_map(self.ram)),
                };
                let Some((_, buffer)) = self.buffers.iter_mut().find(|(index, _)| *index == area) else {
                    return Ok(None);
                };
                let room = buffer.get_mut(offset as usize..).unwrap_or_default();
                let length = room.len();
                room.get_mut(..bytes.len())
                    .ok_or(LaunchError::Parameter { what, needed: bytes.len(), room: length })?
                    .copy_from_slice(&bytes);
            }
            Directive::Insert { gpa, area } => {
                let at = self.buffers.iter().position(|(index, _)| *index == area);
                return Ok(at.map(|at| (gpa, self.buffers.swap_remove(at).1)));
            }
            Directive::Page(_) | Directive::Required { .. } => {}
        }
        Ok(None)
    }
}

fn memory_map(ram: &[(u64, u64)]) -> Vec<u8> {
    let entry = |(start, size): &(u64, u64)| {
        let mut bytes = [0; size_of::<MapEntry>()];
        bytes[..8].copy_from_slice(&memory::pages(*start).to_le_bytes());
        bytes[8..16].copy_from_slice(&memory::pages(*size).to_le_bytes());
        bytes[16..18].copy_from_slice(&MapEntry::MEMORY.to_le_bytes());
        bytes
    };
    // One entry of no pages ends it.
    ram.iter().map(entry).chain([[0; size_of::<MapEntry>()]]).flatten().collect()
}

/// Copies everything into RAM. The kernel does it: through a mapping of the file, each 16 of its pages would cost a page fault.
///
/// # Errors
/// [`LaunchError::Write`], also when the file became shorter since it was checked.
pub fn load(plan: &Plan, mut file: &File, memory: &Ram) -> Result<(), LaunchError> {
    let failed = |gpa, reason: String| LaunchError::Write { gpa, reason };
    let write = |gpa: u64, bytes: &[u8]| {
        memory.write_slice(bytes, GuestAddress(gpa)).map_err(|e| failed(gpa, e.to_string()))
    };
    for copy in &plan.copies {
        let failed = |e: &dyn Display| failed(copy.gpa, e.to_string());
        if copy.times == 1 {
            file.seek(SeekFrom::Start(copy.offset)).map_err(|e| failed(&e))?;
            memory
                .read_exact_volatile_from(GuestAddress(copy.gpa), &mut file, copy.size as usize)
                .map_err(|e| failed(&e))?;
        } else {
            let mut bytes = vec![0; copy.size as usize];
            file.read_exact_at(&mut bytes, copy.offset).map_err(|e| failed(&e))?;
            let (all, size) = ((copy.size * copy.times) as usize, bytes.len());
            let room = memory.get_slice(GuestAddress(copy.gpa), all).map_err(|e| failed(&e))?;
            for at in (0..all).step_by(size) {
                room.subslice(at, size).map_err(|e| failed(&e))?.copy_from(&bytes);
            }
        }
    }
    plan.areas.iter().try_for_each(|(gpa, bytes)| write(*gpa, bytes))
}

/// Tells the kernel of an image that was [loaded](load) how many processors to start; those beyond wait for its init. On a plain VM alone: a
/// TEE measures the command line.
///
/// # Errors
/// [`LaunchError::CommandLine`], [`LaunchError::Write`].
pub fn start_fewer(count: u32, memory: &Ram) -> Result<(), LaunchError> {
    let failed =
        |e: vm_memory::GuestMemoryError| LaunchError::Write { gpa: COMMAND_LINE, reason: e.to_string() };
    let mut line = [0; COMMAND_LINE_MAX as usize];
    memory.read_slice(&mut line, GuestAddress(COMMAND_LINE)).map_err(failed)?;
    // Its NUL is written by nobody: RAM is zero.
    let word = format!(" maxcpus={count}");
    let end = line.iter().position(|byte| *byte == 0).filter(|end| end + word.len() < line.len());
    let end = end.ok_or_else(|| LaunchError::CommandLine(word.clone()))?;
    memory.write_slice(word.as_bytes(), GuestAddress(COMMAND_LINE + end as u64)).map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::igvm::{Page, PageKind, Snp};

    const RAM: [(u64, u64); 1] = [(0, 64 << 20)];

    fn page(gpa: u64, offset: u64) -> Directive {
        Directive::Page(Page {
            gpa,
            offset: Some(offset),
            shared: false,
            unmeasured: false,
            kind: PageKind::Normal,
        })
    }

    fn image(directives: &[Directive]) -> Image {
        Image { directives: directives.to_vec(), registers: Some(Registers::default()), snp: Snp::default() }
    }

    #[test]
    fn fewer_processors_are_told_behind_the_line() {
        let memory = Ram::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let room = COMMAND_LINE_MAX as usize;
        let told = |line: &[u8]| {
            memory.write_slice(&vec![0; room], GuestAddress(COMMAND_LINE)).unwrap();
            memory.write_slice(line, GuestAddress(COMMAND_LINE)).unwrap();
            start_fewer(3, &memory)?;
            let mut all = vec![0; room];
            memory.read_slice(&mut all, GuestAddress(COMMAND_LINE)).unwrap();
            all.truncate(all.iter().position(|byte| *byte == 0).unwrap());
            Ok::<_, LaunchError>(all)
        };
        assert_eq!(told(b"quiet").unwrap(), b"quiet maxcpus=3");
        let word = " maxcpus=3".len();
        assert_eq!(told(&vec![b'x'; room - word - 1]).unwrap().len(), room - 1);
        assert_eq!(told(&vec![b'x'; room - word]), Err(LaunchError::CommandLine(" maxcpus=3".into())));
        assert!(told(&vec![b'x'; room]).is_err());
    }

    #[test]
    fn neighbours_become_one_copy() {
        let plan =
            plan(&image(&[page(0x1000, 0x400), page(0x2000, 0x1400), page(0x4000, 0x2400)]), &RAM, 1, &[])
                .unwrap();
        assert_eq!(
            plan.copies,
            [
                Copy { gpa: 0x1000, offset: 0x400, size: 0x2000, times: 1 },
                Copy { gpa: 0x4000, offset: 0x2400, size: 0x1000, times: 1 }
            ]
        );
    }

    #[test]
    fn the_same_page_again_and_again_is_read_once_and_lies_everywhere() {
        let pages = [
            page(0x1000, 0x400),
            page(0x2000, 0x1400),
            page(0x3000, 0x1400),
            page(0x4000, 0x1400),
            page(0x5000, 0x2400),
        ];
        let plan = plan(&image(&pages), &RAM, 1, &[]).unwrap();
        let copy = |gpa, offset, size, times| Copy { gpa, offset, size, times };
        let wanted = [
            copy(0x1000, 0x400, 0x2000, 1),
            copy(0x3000, 0x1400, 0x1000, 2),
            copy(0x5000, 0x2400, 0x1000, 1),
        ];
        assert_eq!(plan.copies, wanted);

        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..0x3400u32).map(|at| (at * 7 / 0x100) as u8 ^ at as u8).collect();
        file.write_all(&content).unwrap();
        let memory = memory::reserve(32).unwrap();
        load(&plan, &file, &memory).unwrap();
        for page in &pages {
            let Directive::Page(page) = page else { unreachable!() };
            let (mut found, at) = (vec![0; PAGE as usize], page.offset.unwrap() as usize);
            memory.read_slice(&mut found, GuestAddress(page.gpa)).unwrap();
            assert_eq!(found, content[at..at + PAGE as usize], "{:#x}", page.gpa);
        }
        // A file that became shorter is an error, not the end of the process.
        file.set_len(0x3000).unwrap();
        assert!(matches!(load(&plan, &file, &memory), Err(LaunchError::Write { gpa: 0x5000, .. })));
    }

    #[test]
    fn pages_outside_ram_or_twice_are_refused() {
        let refused = |directives: &[Directive]| plan(&image(directives), &RAM, 1, &[]).unwrap_err();
        assert!(matches!(refused(&[page(64 << 20, 0x400)]), LaunchError::NotRam { .. }));
        assert_eq!(
            refused(&[page(0x1000, 0x400), page(0x1000, 0x1400)]),
            LaunchError::Overlap { gpa: 0x1000 }
        );
        let headless = Image { registers: None, ..image(&[page(0x1000, 0x400)]) };
        assert_eq!(plan(&headless, &RAM, 1, &[]), Err(LaunchError::NoContext));
    }

    #[test]
    fn parameters_are_filled_and_too_little_room_is_refused() {
        let directives = |offset| {
            image(&[
                Directive::Area { index: 3, size: PAGE, initial: None },
                Directive::Parameter { kind: ParameterKind::VpCount, area: 3, offset: 0 },
                Directive::Parameter { kind: ParameterKind::MemoryMap, area: 3, offset },
                Directive::Insert { gpa: 0x3000, area: 3 },
            ])
        };
        let good = plan(&directives(64), &RAM, 4, &[]).unwrap();
        let (gpa, bytes) = &good.areas[0];
        assert_eq!((*gpa, &bytes[..4]), (0x3000, &[4, 0, 0, 0][..]));
        assert_eq!(&bytes[64..82], &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert!(matches!(
            plan(&directives(4090), &RAM, 4, &[]),
            Err(LaunchError::Parameter { needed: 48, room: 6, .. })
        ));
    }
}
