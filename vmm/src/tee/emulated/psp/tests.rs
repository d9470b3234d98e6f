//! Whole launches against the security processor in software: which it finishes, and with which status it refuses.

use p384::ecdsa::{Signature, SigningKey, signature::Signer};

use super::*;
use crate::{
    igvm::IdBlock,
    tee::snp::{
        launch::{self, Launch, SnpError, State},
        plan::{self, LaunchPlan, tests as plans},
    },
};

/// Works with the security processor before it has had a command, and what became of the guest.
fn with_host<T>(plan: &LaunchPlan, vcpus: u32, work: impl FnOnce(&mut Launching<'_>) -> T) -> (T, Guest) {
    let mut guest = Guest::new().unwrap();
    let mut rmp = Rmp::new(&plans::RAM);
    let views = Views::new(&plans::RAM, plan.window, 47).unwrap();
    let done = work(&mut Launching {
        guest: &mut guest,
        rmp: &mut rmp,
        views: &views,
        vmsa: &plan.vmsa,
        vcpus,
        identity: plan.identity.as_ref(),
    });
    (done, guest)
}

/// Launches a plan with processors, and what became of the guest.
fn launch(plan: &LaunchPlan, file: &[u8], vcpus: u32) -> (Result<(), SnpError>, Guest) {
    with_host(plan, vcpus, |host| {
        let mut launch = Launch::default();
        let page = [0; PAGE as usize];
        let needs = launch::Guest { ram: &plans::RAM, file, cpuid: &page };
        let done = launch
            .init(plan.vmsa.features(), host)
            .and_then(|()| launch.run(plan, &needs, host, &mut |_| {}));
        assert_eq!(launch.state() == State::Finished, done.is_ok());
        done
    })
}

fn plan_of(file: &[u8], id_block: Option<IdBlock>) -> LaunchPlan {
    let mut image = plans::image();
    image.snp.id_block = id_block;
    plan::plan(&image, file, &plans::options()).unwrap()
}

fn status(done: Result<(), SnpError>) -> u32 {
    match done.unwrap_err() {
        SnpError::Command { command: "SNP_LAUNCH_FINISH", status, .. } => status,
        other => panic!("{other}"),
    }
}

/// Signature (r and s) and public key (curve, x, y) in an IGVM header's form, little-endian.
fn signature(key: &SigningKey, message: &[u8]) -> Vec<u8> {
    let signature: Signature = key.sign(message);
    let bytes = signature.to_bytes();
    [number(&bytes[..48]), number(&bytes[48..])].concat()
}

fn public_key(key: &SigningKey) -> Vec<u8> {
    let point = key.verifying_key().to_sec1_point(false);
    let point = point.as_bytes();
    [vec![2, 0, 0, 0, 0, 0, 0, 0], number(&point[1..49]), number(&point[49..])].concat()
}

fn number(big: &[u8]) -> Vec<u8> {
    let mut bytes: Vec<u8> = big.iter().rev().copied().collect();
    bytes.resize(72, 0);
    bytes
}

/// What the author's key signs: the ID key in 1028 bytes, without the header's reserved word.
fn as_firmware(key: &[u8]) -> Vec<u8> {
    let mut bytes = [&key[..4], &key[8..]].concat();
    bytes.resize(1028, 0);
    bytes
}

/// An identity for a digest, by two keys.
fn signed(digest: &Sha) -> IdBlock {
    let key = |byte| SigningKey::from_slice(&[byte; 48]).unwrap();
    let (id, author) = (key(3), key(4));
    // ID_BLOCK as the ABI has it: digest, family and image id, version, security version, policy.
    let block =
        [&digest[..], &[5; 32], &1u32.to_le_bytes(), &9u32.to_le_bytes(), &0x30000u64.to_le_bytes()].concat();
    let id_key = public_key(&id);
    let parts = [
        signature(&id, &block),
        id_key.clone(),
        signature(&author, &as_firmware(&id_key)),
        public_key(&author),
    ];
    IdBlock {
        author: true,
        digest: *digest,
        ids: [5; 32],
        numbers: [1, 9, 1, 1],
        keys: parts.concat().try_into().unwrap(),
    }
}

#[test]
fn a_signed_launch_is_finished_and_reports_can_name_who_signed() {
    let file = plans::file();
    let (done, unsigned) = launch(&plan_of(&file, None), &file, 1);
    done.unwrap();
    assert_eq!(unsigned.identity, GuestIdentity::default());
    let identity = signed(&unsigned.digest);
    let (done, guest) = launch(&plan_of(&file, Some(identity.clone())), &file, 1);
    done.unwrap();
    assert_eq!(guest.digest, unsigned.digest);
    assert_eq!((guest.host_data, guest.identity.guest_svn), ([7; 32], 9));
    assert_eq!((guest.identity.family_id, guest.identity.image_id), ([5; 16], [5; 16]));
    let key = digest::sha384(&as_firmware(&identity.keys[144..296]));
    let author = digest::sha384(&as_firmware(&identity.keys[440..]));
    assert_eq!((guest.identity.id_key_digest, guest.identity.author_key_digest), (Some(key), Some(author)));
}

#[test]
fn one_bit_of_a_measured_page_or_another_processor_is_not_what_was_signed() {
    let file = plans::file();
    let (_, guest) = launch(&plan_of(&file, None), &file, 1);
    let identity = Some(signed(&guest.digest));
    // The second and third page of the file are measured, the fourth is shared, the first is the VMSA with its RIP at 0x178.
    for (at, refused) in [(0x178, true), (0x1000, true), (0x2fff, true), (0x3000, false)] {
        let mut changed = file.clone();
        changed[at] ^= 0x10;
        let (done, guest) = launch(&plan_of(&changed, identity.clone()), &changed, 1);
        assert_eq!((done.is_err(), guest.finished), (refused, !refused), "{at:#x}");
        if refused {
            let words = done.as_ref().unwrap_err().to_string();
            assert_eq!(status(done), BAD_MEASUREMENT);
            assert!(words.contains("BAD_MEASUREMENT: the image or the number of processors"), "{words}");
        }
    }
    assert_eq!(status(launch(&plan_of(&file, identity), &file, 2).0), BAD_MEASUREMENT);
}

#[test]
fn one_bit_of_a_signature_or_key_and_another_policy_are_refused() {
    let file = plans::file();
    let (_, guest) = launch(&plan_of(&file, None), &file, 1);
    let good = signed(&guest.digest);
    // r, s, x and y of both.
    for at in [0, 72, 152, 224, 296, 368, 448, 520] {
        let mut forged = good.clone();
        forged.keys[at] ^= 1;
        assert_eq!(status(launch(&plan_of(&file, Some(forged)), &file, 1).0), BAD_SIGNATURE, "{at}");
    }
    let mut other = good.clone();
    other.numbers[1] += 1;
    assert_eq!(status(launch(&plan_of(&file, Some(other)), &file, 1).0), BAD_SIGNATURE);
    // The plan writes its own policy into the block, so this is what a changed block in memory would give.
    let mut plan = plan_of(&file, Some(good));
    plan.policy |= policy::DEBUG;
    assert_eq!(status(launch(&plan, &file, 1).0), POLICY_FAILURE);
}

#[test]
fn commands_out_of_order_and_pages_launched_twice_are_refused() {
    let file = plans::file();
    let plan = plan_of(&file, None);
    with_host(&plan, 1, |host| {
        let refused = |errno, status| Err(Failure { errno, status });
        assert_eq!(host.launch_page(0x8000, PageType::Normal), refused(libc::EIO, INVALID_GUEST_STATE));
        assert_eq!(host.finish([0; 32], false), refused(libc::EIO, INVALID_GUEST_STATE));
        for wrong in [0, policy::ONE, policy::SMT, policy::ONE | policy::SMT | policy::SINGLE_SOCKET] {
            assert_eq!(host.start(wrong), refused(libc::EIO, POLICY_FAILURE), "{wrong:#x}");
        }
        host.start(0x30000).unwrap();
        assert_eq!(host.start(0x30000), refused(libc::EINVAL, 0));
        host.launch_page(0x8000, PageType::Normal).unwrap();
        assert_eq!(host.launch_page(0x8000, PageType::Normal), refused(libc::EEXIST, INVALID_PAGE_STATE));
        assert_eq!(host.launch_page(0x9000, PageType::Vmsa), refused(libc::EIO, INVALID_PARAM));
        assert_eq!(host.launch_page(64 << 20, PageType::Normal), refused(libc::EFAULT, 0));
        host.finish([0; 32], false).unwrap();
        assert_eq!(host.finish([0; 32], false), refused(libc::EIO, INVALID_GUEST_STATE));
        assert_eq!(host.launch_page(0xb000, PageType::Normal), refused(libc::EIO, INVALID_GUEST_STATE));
    });
}
