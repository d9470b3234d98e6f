//! The documents' tables against the code that they describe.

use std::{collections::BTreeMap, fs, path::PathBuf};

use coffer_layout::{HIGH_RAM, LOW_RAM_END, MMIO_BASE, boot, snp};

fn document(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The first two cells of each row whose first is in backquotes.
fn rows(text: &str) -> Vec<(String, String)> {
    let row = |line: &str| {
        let mut cells = line.split('|').map(str::trim).skip(1);
        let name = cells.next()?.strip_prefix('`')?.strip_suffix('`')?;
        Some((name.to_owned(), cells.next()?.to_owned()))
    };
    text.lines().filter_map(row).collect()
}

#[test]
fn the_memory_map_is_the_layouts() {
    let constants = BTreeMap::from([
        ("snp::SECRETS", snp::SECRETS),
        ("snp::CPUID", snp::CPUID),
        ("snp::PAGE_TABLES", snp::PAGE_TABLES),
        ("snp::CC_DATA", snp::CC_DATA),
        ("snp::GHCB", snp::GHCB),
        ("snp::SITES", snp::SITES),
        ("snp::PAYLOAD", snp::PAYLOAD),
        ("boot::PARAMETERS", boot::PARAMETERS),
        ("boot::HANDOFF", boot::HANDOFF),
        ("boot::STACK_TOP", boot::STACK_TOP),
        ("boot::SHIM_BASE", boot::SHIM_BASE),
        ("boot::PAGE_TABLES", boot::PAGE_TABLES),
        ("boot::COMMAND_LINE", boot::COMMAND_LINE),
        ("boot::BOOT_PARAMS", boot::BOOT_PARAMS),
        ("boot::MP_TABLE", boot::MP_TABLE),
        ("boot::ACPI", boot::ACPI),
        ("boot::MP_POINTER", boot::MP_POINTER),
        ("boot::HIGH_START", boot::HIGH_START),
        ("LOW_RAM_END", LOW_RAM_END),
        ("MMIO_BASE", MMIO_BASE),
        ("HIGH_RAM", HIGH_RAM),
    ]);
    let written: BTreeMap<_, _> = rows(&document("memory-map.md")).into_iter().collect();
    for (name, address) in &constants {
        assert_eq!(written.get(*name), Some(&format!("{address:#x}")), "{name}");
    }
    assert_eq!(written.len(), constants.len(), "{written:?}");
}

#[test]
fn the_boot_stages_are_the_traces() {
    let written: Vec<_> = rows(&document("boot-stages.md")).into_iter().map(|(name, _)| name).collect();
    let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../vmm/src");
    let read = |file: &str| fs::read_to_string(source.join(file)).unwrap();
    let code = [read("trace.rs"), read("machine.rs"), read("main.rs")].concat();
    for stage in &written {
        assert!(code.contains(&format!("\"{stage}\"")), "{stage} is in no source file");
    }
    // Guest marks are the strings of one function; host stages are arguments of another.
    let marks = code.split("mark::").skip(1).filter_map(|t| t.split_once("=> \"")?.1.split('"').next());
    let stages = ["trace.stage(\"", "trace.stage_at(\""]
        .into_iter()
        .flat_map(|call| code.split(call).skip(1).filter_map(|t| t.split('"').next()).collect::<Vec<_>>());
    for stage in marks.chain(stages).filter(|s| s.len() > 1) {
        assert!(written.iter().any(|w| w == stage), "{stage} is not in docs/boot-stages.md");
    }
}
