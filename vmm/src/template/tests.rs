//! What is read of a template that somebody or something changed.

use std::os::unix::fs::{PermissionsExt, symlink};

use kvm_bindings::{kvm_cpuid_entry2, kvm_msr_entry};
use proptest::prelude::*;

use super::{
    format::{FormatError, read, wrap, write},
    memory::Extent,
    processor::ProcessorState,
    *,
};

fn cpuid(ecx: u32) -> CpuId {
    CpuId::from_entries(&[kvm_cpuid_entry2 { function: 1, ecx, ..Default::default() }]).unwrap()
}

fn args(image: &Path) -> Args {
    Args { image: image.into(), memory_mib: 64, vcpus: 1, ..Args::default() }
}

fn state(args: &Args) -> State {
    let msrs = vec![kvm_msr_entry { index: 0x10, data: 77, ..Default::default() }];
    State {
        shape: shape(args),
        host_run: host_run().unwrap(),
        cpuid: digest_of(&cpuid(5)),
        image: Content::of(&args.image).unwrap(),
        program: Content::of(Path::new(PROGRAM)).unwrap(),
        memory: Identity::default(),
        extents: vec![Extent { gpa: 0x1000, size: 0x1000 }],
        clock_ns: 12,
        chips: CHIPS.map(|chip_id| kvm_irqchip { chip_id, ..Default::default() }).to_vec(),
        processors: vec![ProcessorState { msrs, tsc_khz: 5, ..Default::default() }],
        windows: Vec::new(),
    }
}

/// A template as it lies in a directory, and its arguments.
struct Made {
    directory: tempfile::TempDir,
    args: Args,
}

impl Made {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        fs::write(&image, b"an image").unwrap();
        let made = Self { args: args(&image), directory };
        fs::create_dir(made.path()).unwrap();
        made.allow(&made.path(), 0o700);
        fs::write(memory_of(&made.path()), [1; 8192]).unwrap();
        made.allow(&memory_of(&made.path()), 0o600);
        made.save(|_| {});
        made
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("template")
    }

    fn allow(&self, path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn save(&self, change: impl FnOnce(&mut State)) {
        let mut state = state(&self.args);
        state.memory = Identity::of(&fs::metadata(memory_of(&self.path())).unwrap());
        change(&mut state);
        fs::write(state_of(&self.path()), write(&state)).unwrap();
        self.allow(&state_of(&self.path()), 0o600);
    }

    fn find(&self) -> Result<Template, TemplateError> {
        find(&self.path(), &self.args, &cpuid(5))
    }

    fn refusal(&self) -> String {
        self.find().err().expect("a template that must be refused was taken").to_string()
    }
}

#[test]
fn a_whole_template_is_found_as_it_was_written() {
    let found = Made::new().find().unwrap().state;
    assert_eq!((found.clock_ns, found.extents[0].gpa), (12, 0x1000));
    assert_eq!((found.processors[0].msrs[0].data, found.processors[0].tsc_khz), (77, 5));
}

#[test]
fn another_machine_image_host_or_memory_does_not_fit() {
    let mut made = Made::new();
    made.args.memory_mib = 128;
    assert!(made.refusal().starts_with("the machine "));
    let made = Made::new();
    made.save(|state| state.host_run.push('x'));
    assert!(made.refusal().starts_with("the host"));
    made.save(|state| state.cpuid = digest_of(&cpuid(6)));
    assert!(made.refusal().starts_with("what KVM's CPUID says"));
    made.save(|state| state.program = Content::default());
    assert!(made.refusal().starts_with("the VMM"));
    made.save(|_| {});
    fs::write(memory_of(&made.path()), [2; 8192]).unwrap();
    assert!(made.refusal().starts_with("its memory file"));
    made.save(|_| {});
    fs::write(&made.args.image, b"An image").unwrap();
    assert!(made.refusal().starts_with("the image"));
    // The same bytes in another file are the same image.
    fs::remove_file(&made.args.image).unwrap();
    fs::write(&made.args.image, b"an image").unwrap();
    made.find().unwrap();
}

#[test]
fn what_others_may_write_or_what_is_a_link_is_refused() {
    for mode in [0o701, 0o710, 0o770, 0o750] {
        let made = Made::new();
        made.allow(&made.path(), mode);
        assert!(made.refusal().contains("must belong to this user"), "{mode:o}");
    }
    for (file, mode) in [("state", 0o620), ("state", 0o602), ("memory", 0o604), ("memory", 0o660)] {
        let made = Made::new();
        made.allow(&made.path().join(file), mode);
        assert!(made.refusal().contains("must belong to this user"), "{file} {mode:o}");
    }
    for file in ["state", "memory"] {
        let made = Made::new();
        let (path, aside) = (made.path().join(file), made.path().join("aside"));
        fs::rename(&path, &aside).unwrap();
        symlink(&aside, &path).unwrap();
        assert!(made.refusal().starts_with("open "), "{file}");
    }
}

#[test]
fn a_state_that_no_machine_can_have_is_refused() {
    let made = Made::new();
    for change in [
        (|state: &mut State| state.processors.clear()) as fn(&mut State),
        |state| state.chips.truncate(2),
        |state| state.chips.swap(0, 1),
        |state| state.extents[0].gpa = 64 << 20,
        |state| state.extents.push(Extent { gpa: 0, size: 0x1000 }),
    ] {
        made.save(change);
        assert!(made.refusal().starts_with("state: "), "{}", made.refusal());
    }
}

#[test]
fn every_damage_is_told_in_one_line() {
    let image = tempfile::NamedTempFile::new().unwrap();
    let whole = write(&state(&args(image.path())));
    assert!(read(&whole).is_ok());
    let later = [&whole[..8], &2u32.to_le_bytes(), &whole[12..]].concat();
    assert_eq!(read(&later).err(), Some(FormatError::Version(2)));
    assert!(matches!(read(&whole[..whole.len() - 1]), Err(FormatError::Length { .. })));
    assert!(matches!(read(&[&whole[..], b" "].concat()), Err(FormatError::Length { .. })));
    assert_eq!(read(&[]).err(), Some(FormatError::Magic));
    assert!(matches!(read(&wrap(b"{}")), Err(FormatError::Content(words)) if !words.contains('\n')));
}

proptest! {
    #[test]
    fn any_bytes_are_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(read(&bytes).is_err());
        prop_assert!(read(&wrap(&bytes)).is_err());
    }

    #[test]
    fn a_changed_bit_or_a_lost_end_is_noticed(place in any::<prop::sample::Index>(), bit in 0u8..8, end in any::<prop::sample::Index>()) {
        let image = tempfile::NamedTempFile::new().unwrap();
        let mut bytes = write(&state(&args(image.path())));
        prop_assert!(read(&bytes[..end.index(bytes.len())]).is_err());
        let at = place.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert!(read(&bytes).is_err());
    }
}
