//! Network devices that come to a machine while it runs.
//!
//! Owns: which place such a device gets, why it gets none. Does not own: the tap, which is its host's, and telling the guest, which looks at a
//! place again when it hears of an interface that it does not know.
//!
//! A place that nobody uses costs the guest one read at boot, and this nothing until a host asks.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
};

use coffer_layout::slot;
use coffer_protocol::vm::NetAnswer;
use kvm_ioctls::VmFd;

use super::attach;
use crate::{
    args::{Args, Tee},
    devices::{
        board::{Slot, Slots},
        virtio::net::Net,
    },
    memory::Ram,
};

/// The machine's places for network devices.
pub(super) struct Arrivals {
    vm: Arc<VmFd>,
    memory: Arc<Ram>,
    places: Vec<Slot>,
    tee: Tee,
    refusal: Option<&'static str>,
}

impl Arrivals {
    pub(super) fn new(args: &Args, vm: &Arc<VmFd>, memory: &Arc<Ram>, slots: &Slots) -> Self {
        Self {
            vm: Arc::clone(vm),
            memory: Arc::clone(memory),
            places: slots[slot::NET..slot::NET + slot::NETS].to_vec(),
            tee: args.tee,
            refusal: args.make_template.is_some().then_some("it is saved as a template"),
        }
    }

    /// Answers a host that wants a device with this address on this tap.
    pub(super) fn answer(&self, mac: [u8; 6], tap: Option<OwnedFd>) -> NetAnswer {
        match self.add(mac, tap) {
            Ok(()) => NetAnswer::Added,
            Err(words) => NetAnswer::Refused(words),
        }
    }

    fn add(&self, mac: [u8; 6], tap: Option<OwnedFd>) -> Result<(), String> {
        if let Some(words) = self.refusal {
            return Err(words.into());
        }
        let tap = tap.ok_or("no descriptor of a tap came along")?;
        let (place, slot) = free(&self.places)
            .ok_or_else(|| format!("a VM has {} network devices at most, and these are there", slot::NETS))?;
        // Its MTU is not asked for, which takes a socket: none can be made any more, and the guest is told by its host.
        let device = Net::new(tap, mac).map_err(|e| e.to_string())?;
        let window = attach(slot::NET + place, Box::new(device), &self.vm, &self.memory, self.tee);
        slot.set(Mutex::new(window.map_err(|e| e.to_string())?)).map_err(|_| "its place is taken".into())
    }
}

/// The first place without a device.
fn free(places: &[Slot]) -> Option<(usize, &Slot)> {
    places.iter().enumerate().find(|(_, slot)| slot.get().is_none())
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;
    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::devices::virtio::{mmio::Window, rng::Rng};

    #[test]
    fn devices_come_to_the_first_place_that_is_free_until_there_is_none() {
        let slots = Slots::default();
        let places = slots[slot::NET..slot::NET + slot::NETS].to_vec();
        let memory = Arc::new(Ram::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
        let take = |index: usize| {
            let line = Arc::new(EventFd::new(0).unwrap());
            let window = Window::new(Box::new(Rng::default()), Arc::clone(&memory), line).unwrap();
            assert!(places[index].set(Mutex::new(window)).is_ok());
        };
        let place = || free(&places).map(|(place, _)| place);
        take(1);
        assert_eq!(place(), Some(0));
        take(0);
        assert_eq!(place(), Some(2));
        take(2);
        assert_eq!(place(), None);
        // The board shows them to the guest.
        assert!(slots[slot::NET + 2].get().is_some() && slots[slot::BLK].get().is_none());
    }
}
