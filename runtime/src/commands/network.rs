//! The network that came into a container's namespace since `create`, or changed there: put in by hooks, or by the caller before `start`.
//!
//! Owns: when it is looked at, and what is new in it becoming the VM's. Does not own: reading the namespace and taps (`network`).

use std::{fs, path::PathBuf};

use coffer_protocol::{Interface, Request};

use crate::{
    client,
    error::{Error, host},
    network::{inside, look, may_have_more, tie, untie},
    state::{Directory, Record},
};

/// Gives the VM a device for each interface that has none yet, and tells its guest what the network is now.
///
/// For a VM's first container all of it is said again. Further ones find the network as their pod has it, where containers may have changed
/// what is theirs: nothing is said unless an interface is new.
pub(super) fn renew(directory: &Directory, record: &Record) -> Result<(), Error> {
    let Some(stub) = record.stub else { return Ok(()) };
    let process = PathBuf::from(format!("/proc/{}", stub.pid));
    let table =
        fs::read_to_string(process.join("net/dev")).map_err(host("look at the container's network"))?;
    if !may_have_more(&table, record.share.is_none()) {
        return Ok(());
    }
    let network = inside(&process.join("ns/net"), || {
        let seen = look()?;
        seen.untied().try_for_each(|(interface, index)| plug(directory, interface, index))?;
        Ok(seen.network)
    })?;
    if network.interfaces.is_empty() {
        return Ok(());
    }
    client::ask(&directory.socket(), &Request::Network(network)).map(drop)
}

fn plug(directory: &Directory, interface: &Interface, index: u32) -> Result<(), Error> {
    let tap = tie(interface, index)?;
    client::add_net(&directory.socket(), &tap.mac, &tap.fd).map_err(|error| {
        untie(interface);
        match error {
            Error::State(words) => Error::State(format!("network: interface {}: {words}", interface.name)),
            other => other,
        }
    })
}
