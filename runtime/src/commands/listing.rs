//! `list` and `ps`: tables and JSON of what is there.

use std::{io::Write, path::Path};

use coffer_protocol::{ProcessInfo, Reply, Request};
use serde_json::json;

use super::{find, print};
use crate::{
    cli::Call,
    client, clock,
    error::Error,
    log,
    state::{self, Record, Status},
};

/// The format that was asked for: `table` unless `json`.
fn wants_json(call: &Call) -> Result<bool, Error> {
    match call.value("format") {
        None | Some("table") => Ok(false),
        Some("json") => Ok(true),
        Some(other) => Err(Error::Usage(format!("invalid format {other:?}: table or json is wanted"))),
    }
}

/// A number of zero for what has ended, as runc says it.
fn pid(record: &Record, status: Status) -> i32 {
    if status == Status::Stopped { 0 } else { record.stub.map_or(0, |p| p.pid) }
}

/// All containers of a root directory.
pub(super) fn list(call: &Call, root: &Path) -> Result<i32, Error> {
    let json_wanted = wants_json(call)?;
    super::collect(root);
    let all: Vec<_> = state::all(root).into_iter().map(|(d, r)| (d.status(&r), r)).collect();
    let mut out = std::io::stdout().lock();
    if call.has("quiet") {
        for (_, record) in &all {
            let _ = writeln!(out, "{}", record.id);
        }
    } else if json_wanted {
        let entry = |(status, record): &(Status, Record)| {
            let mut value = state::json(record, *status);
            value["owner"] = json!("root");
            value
        };
        let entries: Vec<_> = all.iter().map(entry).collect();
        let _ = writeln!(out, "{}", if entries.is_empty() { json!(null) } else { json!(entries) });
    } else {
        let cells = all.iter().map(|(status, r)| {
            let bundle = r.bundle.display().to_string();
            vec![
                r.id.clone(),
                pid(r, *status).to_string(),
                status.word().into(),
                bundle,
                r.created.clone(),
                "root".into(),
            ]
        });
        let head = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(String::from).to_vec();
        let _ = out.write_all(table(std::iter::once(head).chain(cells).collect()).as_bytes());
    }
    Ok(0)
}

/// Columns as wide as their widest cell, three spaces apart.
fn table(rows: Vec<Vec<String>>) -> String {
    let width = |column: usize| rows.iter().map(|r| r[column].chars().count()).max().unwrap_or(0) + 3;
    let widths: Vec<usize> = (0..rows.first().map_or(0, Vec::len)).map(width).collect();
    let line = |row: &Vec<String>| {
        let cell = |(cell, width): (&String, &usize)| {
            let blanks = " ".repeat(width - cell.chars().count());
            format!("{cell}{blanks}")
        };
        let cells: String = row.iter().zip(&widths).map(cell).collect();
        format!("{}\n", cells.trim_end())
    };
    rows.iter().map(line).collect()
}

/// Processes of a container: as JSON those of the host, which callers look up there; as a table those in the guest.
pub(super) fn ps(call: &Call, root: &Path) -> Result<i32, Error> {
    let json_wanted = wants_json(call)?;
    let (directory, record) = find(root, call.id()?)?;
    if directory.status(&record) == Status::Stopped {
        return Err(Error::NotRunning);
    }
    let (columns, foreign) = columns(call.words.get(1..).unwrap_or_default())?;
    if json_wanted {
        return print(&json!(record.stub.map(|stub| stubs(stub.pid)).unwrap_or_default()));
    }
    if !foreign.is_empty() {
        log::warn(&format!("ps: {}: left out, this is no ps(1)", foreign.join(" ").escape_debug()));
    }
    let reply = client::ask(&directory.socket(), &Request::Processes { id: record.id.clone() })?;
    let Reply::Processes { list, .. } = reply else {
        return Err(Error::Vm("the guest answered out of order".into()));
    };
    let text = listed(&columns, &list);
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(0)
}

/// What a guest tells of a process: the column's head, and the names that ps(1) has for it.
const COLUMNS: [(&str, &[&str]); 6] = [
    ("UID", &["uid", "euid"]),
    ("PID", &["pid", "tgid"]),
    ("PPID", &["ppid"]),
    ("STIME", &["stime", "start_time"]),
    ("TIME", &["time", "cputime"]),
    ("CMD", &["cmd", "args", "command"]),
];
/// What the columns are without a word on them.
const FULL: [&str; 5] = ["-ef", "-e", "-f", "-A", "ax"];

/// The columns that words for ps(1) ask for, by number, and the words that say anything else, which only a ps in the guest could do.
fn columns(words: &[String]) -> Result<(Vec<usize>, Vec<&str>), Error> {
    let (mut chosen, mut foreign) = (Vec::new(), Vec::new());
    let mut words = words.iter().map(String::as_str);
    while let Some(word) = words.next() {
        let list = match word {
            "-o" | "o" | "-eo" | "-Ao" | "axo" | "--format" => words.next(),
            _ => word.strip_prefix("-o").or_else(|| word.strip_prefix("--format=")),
        };
        match list {
            Some(list) => {
                for name in list.split([',', ' ']).filter(|name| !name.is_empty()) {
                    let found = COLUMNS.iter().position(|(_, names)| names.contains(&name));
                    chosen.push(found.ok_or_else(|| {
                        let told = COLUMNS.map(|(_, names)| names[0]).join(", ");
                        Error::Usage(format!("ps: -o {}: a guest tells {told}", name.escape_debug()))
                    })?);
                }
            }
            None if FULL.contains(&word) => {}
            None => foreign.push(word),
        }
    }
    if chosen.is_empty() {
        chosen = (0..COLUMNS.len()).collect();
    }
    Ok((chosen, foreign))
}

fn listed(columns: &[usize], list: &[ProcessInfo]) -> String {
    let rows = std::iter::once(COLUMNS.map(|(head, _)| head.to_owned())).chain(list.iter().map(row));
    table(rows.map(|row| columns.iter().map(|column| row[*column].clone()).collect()).collect())
}

/// A container's stubs: that of its first process, then those of further ones by number. They are the processes named as it in its namespace
/// of mounts, which is no other container's; a tool that has entered there has another name.
fn stubs(first: i32) -> Vec<i32> {
    let of = |pid: i32| {
        let place = std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok()?;
        Some((place, std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?))
    };
    let Some(wanted) = of(first) else { return vec![first] };
    let names = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = names.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut further: Vec<i32> =
        numbers.filter(|pid| *pid != first && of(*pid).as_ref() == Some(&wanted)).collect();
    further.sort_unstable();
    [vec![first], further].concat()
}

/// Characters of a command that are shown: what init sends, and no more from a guest that has another.
const MOST_COMMAND: usize = 512;

fn row(process: &ProcessInfo) -> [String; 6] {
    let seconds = process.cpu_ms / 1000;
    [
        process.uid.to_string(),
        process.pid.to_string(),
        process.parent.to_string(),
        clock::time_of_day(process.started),
        format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60),
        // The guest's words end up on a terminal of the host.
        process.command.chars().take(MOST_COMMAND).map(|c| if c.is_control() { '?' } else { c }).collect(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_must_be() {
        let rows = vec![["ID", "PID"].map(String::from).to_vec(), ["longer", "7"].map(String::from).to_vec()];
        assert_eq!(table(rows), "ID       PID\nlonger   7\n");
    }

    #[test]
    fn a_guests_words_cannot_steer_the_hosts_terminal() {
        let process =
            ProcessInfo { command: "a\x1b[2Jb".into(), cpu_ms: 3_661_000, ..ProcessInfo::default() };
        assert_eq!(row(&process)[5], "a?[2Jb");
        assert_eq!(row(&process)[4], "01:01:01");
        let process = ProcessInfo { command: "x".repeat(70_000), ..ProcessInfo::default() };
        assert_eq!(row(&process)[5].len(), MOST_COMMAND);
        // Wider than a format's width can be.
        let wide = "y".repeat(70_000);
        let rows = vec![vec![wide.clone(), "1".into()], vec!["z".into(), "2".into()]];
        assert!(table(rows).starts_with(&wide));
    }

    #[test]
    fn the_columns_are_those_that_were_asked_for() {
        let of = |text: &str| {
            let words: Vec<String> = text.split('|').filter(|w| !w.is_empty()).map(str::to_owned).collect();
            let said = columns(&words).map_err(|e| e.to_string())?;
            Ok::<_, String>((said.0, said.1.join(" ")))
        };
        let all = || Ok((vec![0, 1, 2, 3, 4, 5], String::new()));
        assert_eq!(of(""), all());
        assert_eq!(of("-ef"), all());
        let two = || Ok((vec![1, 5], String::new()));
        for words in [
            "-o|pid,args",
            "-eo|pid,cmd",
            "-o|pid|-o|command",
            "-opid,cmd",
            "--format=pid,cmd",
            "-e|o|pid cmd",
        ] {
            assert_eq!(of(words), two(), "{words}");
        }
        assert_eq!(of("aux|--forest"), all().map(|(columns, _)| (columns, "aux --forest".to_owned())));
        assert!(of("-o|pid,rss").unwrap_err().contains("ps: -o rss: a guest tells uid, pid, ppid, stime"));
    }
}
