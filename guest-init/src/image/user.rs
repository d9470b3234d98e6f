//! The image's `User`: numbers and names of the image's own /etc/passwd and /etc/group.
//!
//! Owns: the words, as runc and podman read them. The files are read inside the tree, links and all, and only as
//! far as a bound.

use std::{
    io::{BufRead, BufReader, Read},
    os::fd::OwnedFd,
};

use coffer_layers::unpack::read_in;

use super::ImageError;

/// Longest passwd or group file that is read, in bytes.
const MOST: u64 = 4 << 20;

/// Who runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Further groups that name the user as a member.
    pub(super) groups: Vec<u32>,
}

/// A file's lines, in fields.
type Lines = Vec<Vec<String>>;

/// Lines of a file of the tree; none when it is not there.
fn lines(root: &OwnedFd, path: &str) -> Result<Lines, ImageError> {
    Ok(read_in(root, path)?.map(fields).unwrap_or_default())
}

fn fields(file: impl Read) -> Lines {
    let lines = BufReader::new(file.take(MOST)).split(b'\n').map_while(Result::ok);
    lines.map(|line| String::from_utf8_lossy(&line).split(':').map(str::to_owned).collect()).collect()
}

fn number(fields: &[String], at: usize) -> Option<u32> {
    fields.get(at)?.parse().ok()
}

/// Finds `user[:group]`; empty is root.
pub(super) fn resolve(root: &OwnedFd, text: &str) -> Result<User, ImageError> {
    find(&lines(root, "etc/passwd")?, &lines(root, "etc/group")?, text)
}

fn find(passwd: &Lines, groups: &Lines, text: &str) -> Result<User, ImageError> {
    let wrong = |why| ImageError::User(text.to_owned(), why);
    let (user, group) = text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
    let user = if user.is_empty() { "0" } else { user };
    let uid: Option<u32> = user.parse().ok();
    // A name may look like a number; the name wins, as in runc.
    let entry = passwd
        .iter()
        .find(|fields| fields.first().is_some_and(|name| name == user))
        .or_else(|| passwd.iter().find(|fields| uid.is_some() && number(fields, 2) == uid));
    let found = match (entry, uid) {
        (Some(fields), _) => (number(fields, 2), number(fields, 3)),
        (None, Some(uid)) => (Some(uid), Some(0)),
        (None, None) => return Err(wrong("not in the image's /etc/passwd")),
    };
    let (Some(uid), Some(mut gid)) = found else { return Err(wrong("its line in /etc/passwd is broken")) };
    if let Some(group) = group.filter(|group| !group.is_empty()) {
        let entry = groups.iter().find(|fields| fields.first().is_some_and(|name| name == group));
        gid = entry
            .and_then(|fields| number(fields, 2))
            .or_else(|| group.parse().ok())
            .ok_or_else(|| wrong("its group is not in the image's /etc/group"))?;
    }
    let name = entry.and_then(|fields| fields.first());
    let member = |fields: &&Vec<String>| {
        fields
            .get(3)
            .is_some_and(|list| list.split(',').any(|member| Some(member) == name.map(String::as_str)))
    };
    // With an explicit group runc and podman give no further ones.
    let groups = match group {
        None => groups.iter().filter(member).filter_map(|fields| number(fields, 2)).collect(),
        Some(_) => Vec::new(),
    };
    Ok(User { uid, gid, groups })
}

/// For fuzz targets: user, group and further groups of `text` in an image with these files.
///
/// # Errors
/// [`ImageError`], as when a container is made.
#[cfg(feature = "fuzz")]
pub fn user(passwd: &[u8], group: &[u8], text: &str) -> Result<(u32, u32, Vec<u32>), ImageError> {
    find(&fields(passwd), &fields(group), text).map(|user| (user.uid, user.gid, user.groups))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::fs::write(dir.path().join("etc/passwd"), "root:x:0:0::/:\napp:x:1000:1001::/:\nbad:x:y\n")
            .unwrap();
        std::fs::write(dir.path().join("etc/group"), "root:x:0:\ntape:x:26:other,app\ndisk:x:6:app\n")
            .unwrap();
        let root: OwnedFd = std::fs::File::open(dir.path()).unwrap().into();
        let is = |text: &str, uid, gid, groups: &[u32]| {
            assert_eq!(resolve(&root, text).unwrap(), User { uid, gid, groups: groups.to_vec() }, "{text}");
        };
        is("", 0, 0, &[]);
        is("app", 1000, 1001, &[26, 6]);
        is("1000", 1000, 1001, &[26, 6]);
        is("app:tape", 1000, 26, &[]);
        is("app:77", 1000, 77, &[]);
        is("5:6", 5, 6, &[]);
        is("5", 5, 0, &[]);
        for bad in ["nobody", "app:nogroup", "bad", "-1", "4294967296"] {
            assert!(resolve(&root, bad).is_err(), "{bad}");
        }
    }
}
