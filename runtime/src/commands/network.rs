//! The network that came into a container's namespace since `create`, or changed there: put in by hooks, or by the caller before `start`, or
//! while the container runs.
//!
//! Owns: when it is looked at, and what is new in it becoming the VM's. Does not own: reading the namespace and taps (`network`).

use std::path::{Path, PathBuf};

use coffer_protocol::{Interface, Request};

use crate::{
    client,
    error::Error,
    log,
    network::{glance, inside, look, tie, turn, untie},
    state::{Directory, Record},
};

/// Before `start`: gives the VM a device for each interface that has none yet, and tells its guest what the network is now.
///
/// For a VM's first container all of it is said again. Further ones find the network as their pod has it, where containers may have changed
/// what is theirs: nothing is said unless an interface is new.
pub(super) fn renew(directory: &Directory, record: &Record) -> Result<(), Error> {
    let Some(namespace) = namespace(record) else { return Ok(()) };
    bring(directory, &namespace, record.share.is_none())
}

/// The same for a container that runs. Engines call nobody when they give it another network (`network connect`): it comes with the next call
/// that comes by here. What cannot be had is a warning, for nobody has asked this call for it.
pub(super) fn look_again(directory: &Directory, record: &Record) {
    let Some(namespace) = namespace(record) else { return };
    let looked = inside(&namespace, glance)
        .and_then(|glance| if glance.untied { bring(directory, &namespace, false) } else { Ok(()) });
    if let Err(error) = looked {
        log::warn(&error.line());
    }
}

fn namespace(record: &Record) -> Option<PathBuf> {
    record.stub.map(|stub| PathBuf::from(format!("/proc/{}/ns/net", stub.pid)))
}

fn bring(directory: &Directory, namespace: &Path, all: bool) -> Result<(), Error> {
    // To the guest's answer: who comes next may rely on what is there.
    let _turn = turn(namespace)?;
    let network = inside(namespace, || {
        let glance = glance()?;
        if !(if all { glance.any } else { glance.untied }) {
            return Ok(None);
        }
        let seen = look()?;
        seen.untied().try_for_each(|(interface, index)| plug(directory, interface, index))?;
        Ok(Some(seen.network))
    })?;
    let Some(network) = network.filter(|network| !network.interfaces.is_empty()) else { return Ok(()) };
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
