//! A local APIC and what it does.

use super::*;
use vmm_shared::addr::Gpa;

const KHZ: u32 = 2_000_000;

fn target(id: u32) -> Target {
    Target {
        id: ApicId(id),
        logical: LogicalAddress::FromId,
    }
}

/// In xAPIC mode, switched on by software.
fn in_window(id: u32) -> Lapic {
    let mut lapic = Lapic::new(ApicId(id), KHZ, ApicBase::new(Role::Boot, Mode::XApic));
    assert_eq!(lapic.write_window(0xf0, 0x1ff, 0), LapicEffect::None);
    lapic
}

fn enabled(id: u32) -> Lapic {
    let mut lapic = Lapic::new(ApicId(id), KHZ, ApicBase::new(Role::Boot, Mode::X2Apic));
    lapic.write(register::SPURIOUS, 0x1ff, 0).expect("legal");
    lapic
}

#[test]
fn a_disabled_apic_takes_no_interrupts() {
    let mut lapic = Lapic::new(ApicId(0), KHZ, ApicBase::new(Role::Boot, Mode::X2Apic));
    lapic.request(0x40);
    lapic.request_all([0, 1, 0, 0]);
    assert_eq!(lapic.deliverable(), None);
}

#[test]
fn a_higher_class_interrupts_and_a_lower_one_waits() {
    let mut lapic = enabled(0);
    lapic.request(0x31);
    lapic.request(0x45);
    assert_eq!(lapic.deliverable(), Some(0x45));
    lapic.accept(0x45);
    assert_eq!(lapic.deliverable(), None);
    lapic.request(0x4f);
    assert_eq!(lapic.deliverable(), None, "same class");
    lapic.request(0x51);
    assert_eq!(lapic.deliverable(), Some(0x51));
    lapic.accept(0x51);
    lapic.end_of_interrupt();
    lapic.end_of_interrupt();
    assert_eq!(lapic.deliverable(), Some(0x4f));
}

#[test]
fn the_task_priority_holds_back_its_class_and_below() {
    let mut lapic = enabled(0);
    lapic.request(0x31);
    lapic.set_cr8(3);
    assert_eq!(lapic.read(register::TPR, 0), Ok(0x30));
    assert_eq!(lapic.deliverable(), None);
    lapic.set_cr8(2);
    assert_eq!(lapic.deliverable(), Some(0x31));
}

#[test]
fn vectors_show_in_their_registers() {
    let mut lapic = enabled(0);
    lapic.request(0x31);
    lapic.request(0xef);
    assert_eq!(lapic.read(register::IRR + 1, 0), Ok(1 << 17));
    assert_eq!(lapic.read(register::IRR + 7, 0), Ok(1 << 15));
    lapic.accept(0xef);
    assert_eq!(lapic.read(register::ISR + 7, 0), Ok(1 << 15));
    assert_eq!(lapic.read(register::IRR + 7, 0), Ok(0));
}

#[test]
fn the_deadline_timer_fires_once_at_its_time() {
    let mut lapic = enabled(0);
    lapic.write(register::LVT_TIMER, 0x400ec, 0).expect("legal");
    lapic.set_deadline(1000);
    lapic.run_timer(999);
    assert_eq!(lapic.deliverable(), None);
    assert_eq!(lapic.next_timer(), Some(1000));
    lapic.run_timer(1000);
    assert_eq!(lapic.deliverable(), Some(0xec));
    assert_eq!((lapic.deadline(), lapic.next_timer()), (0, None));
}

#[test]
fn a_masked_timer_runs_out_silently() {
    let mut lapic = enabled(0);
    lapic.write(register::LVT_TIMER, 0x500ec, 0).expect("legal");
    lapic.set_deadline(1);
    lapic.run_timer(2);
    assert_eq!((lapic.deliverable(), lapic.next_timer()), (None, None));
}

#[test]
fn the_counting_timer_keeps_its_period() {
    let mut lapic = enabled(0);
    lapic.write(register::LVT_TIMER, 0x200ec, 0).expect("legal");
    lapic.write(register::DIVIDE, 0b1011, 0).expect("legal");
    // 1,000 ticks of 1 ns are 2,000 TSC ticks at 2 GHz.
    lapic
        .write(register::INITIAL_COUNT, 1000, 500)
        .expect("legal");
    assert_eq!(lapic.next_timer(), Some(2500));
    assert_eq!(lapic.read(register::CURRENT_COUNT, 1500), Ok(500));
    lapic.run_timer(2600);
    assert_eq!(lapic.next_timer(), Some(4500));
    lapic.run_timer(9000);
    assert_eq!(
        lapic.next_timer(),
        Some(10_500),
        "missed periods are dropped"
    );
}

#[test]
fn the_divider_slows_the_count() {
    let mut lapic = enabled(0);
    lapic.write(register::DIVIDE, 0b0011, 0).expect("legal");
    lapic.write(register::INITIAL_COUNT, 100, 0).expect("legal");
    assert_eq!(lapic.next_timer(), Some(3200), "divided by 16");
}

#[test]
fn commands_name_their_destinations() {
    let mut lapic = enabled(1);
    let mut send = |icr| match lapic.write(register::ICR, icr, 0) {
        Ok(LapicEffect::Send(ipi)) => ipi,
        other => panic!("{icr:#x} gives {other:?}"),
    };
    let ipi = send(0x3_0000_00fd);
    assert_eq!(ipi.delivery, Delivery::Fixed(0xfd));
    assert!(ipi.destination.includes(target(3), ApicId(1)));
    assert!(!ipi.destination.includes(target(2), ApicId(1)));

    let logical = send(0x0001_0005_0000_08fd).destination;
    assert!(logical.includes(target(16), ApicId(1)) && logical.includes(target(18), ApicId(1)));
    assert!(!logical.includes(target(17), ApicId(1)) && !logical.includes(target(0), ApicId(1)));

    let others = send(0xc_00fd).destination;
    assert!(others.includes(target(0), ApicId(1)) && !others.includes(target(1), ApicId(1)));
    assert_eq!(send(0x2_0000_4500).delivery, Delivery::Init);
    assert_eq!(send(0x2_0000_4608).delivery, Delivery::StartUp(8));
}

#[test]
fn illegal_accesses_fault() {
    let mut lapic = enabled(0);
    assert_eq!(lapic.write(register::ID, 1, 0), Err(IllegalAccess));
    assert_eq!(lapic.write(register::EOI, 1, 0), Err(IllegalAccess));
    assert_eq!(lapic.write(register::TPR, 0x100, 0), Err(IllegalAccess));
    assert_eq!(
        lapic.write(register::SPURIOUS, 1 << 32, 0),
        Err(IllegalAccess)
    );
    assert_eq!(lapic.write(0x7f, 0, 0), Err(IllegalAccess));
    assert_eq!(lapic.read(register::EOI, 0), Err(IllegalAccess));
    assert_eq!(lapic.read(register::SELF_IPI, 0), Err(IllegalAccess));
}

#[test]
fn a_vector_below_16_is_an_error_and_is_not_sent() {
    let mut lapic = enabled(0);
    assert_eq!(lapic.write(register::ICR, 0x0f, 0), Ok(LapicEffect::None));
    lapic.write(register::ERROR_STATUS, 0, 0).expect("legal");
    assert_eq!(
        lapic.read(register::ERROR_STATUS, 0),
        Ok(ERROR_ILLEGAL_VECTOR_SENT.into())
    );
}

#[test]
fn the_window_is_open_in_its_mode_only() {
    let mut lapic = in_window(3);
    assert_eq!(lapic.window_offset(Gpa(0xfee0_0030)), Some(0x30));
    assert_eq!(lapic.window_offset(Gpa(0xfee0_1000)), None);
    assert_eq!(lapic.read_window(0x20, 0), 3 << 24);
    assert_eq!(lapic.read_window(0x30, 0), VERSION);
    assert_eq!(lapic.read_msr(register::ID, 0), Err(IllegalAccess));
    lapic.set_base(0xfee0_0d00, 40).expect("to x2APIC");
    assert_eq!(lapic.window_offset(Gpa(0xfee0_0030)), None);
    assert_eq!(lapic.read_msr(register::ID, 0), Ok(3));
}

#[test]
fn switched_off_it_forgets_everything() {
    let mut lapic = in_window(0);
    lapic.request(0x40);
    lapic.set_base(0xfee0_0100, 40).expect("off");
    assert_eq!((lapic.deliverable(), lapic.is_enabled()), (None, false));
    assert_eq!(lapic.logical_address(), LogicalAddress::Off);
    assert_eq!(lapic.window_offset(Gpa(0xfee0_0000)), None);
    lapic.set_base(0xfee0_0900, 40).expect("on");
    assert_eq!(lapic.read_window(0xf0, 0), SPURIOUS_RESET);
}

#[test]
fn a_command_in_halves_is_sent_by_the_low_one() {
    let mut lapic = in_window(0);
    assert_eq!(lapic.write_window(0x310, 0x0200_0000, 0), LapicEffect::None);
    let sent = lapic.write_window(0x300, 0x40fd, 0);
    let expected = Ipi {
        destination: Destination::Physical(ApicId(2)),
        delivery: Delivery::Fixed(0xfd),
    };
    assert_eq!(sent, LapicEffect::Send(expected));
    assert_eq!(lapic.read_window(0x310, 0), 0x0200_0000);
    assert_eq!(lapic.read_window(0x300, 0), 0x40fd);
}

#[test]
fn logical_destinations_follow_the_model() {
    let mut lapic = in_window(0);
    let meant = |lapic: &Lapic, wanted| {
        let target = Target {
            id: lapic.id(),
            logical: lapic.logical_address(),
        };
        Destination::eight_bits(wanted, true).includes(target, ApicId(9))
    };
    assert_eq!(
        lapic.write_window(0xd0, 0x2400_0000, 0),
        LapicEffect::Addressed
    );
    assert!(meant(&lapic, 0x04) && meant(&lapic, 0x20) && !meant(&lapic, 0xdb));
    assert_eq!(
        lapic.write_window(0xe0, 0x0fff_ffff, 0),
        LapicEffect::Addressed
    );
    assert!(meant(&lapic, 0x24) && meant(&lapic, 0xf4) && !meant(&lapic, 0x14));
    assert!(!meant(&lapic, 0x2b) && meant(&lapic, 0xff));
}

#[test]
fn the_count_goes_on_between_its_modes() {
    let mut lapic = in_window(0);
    assert_eq!(lapic.write_window(0x3e0, 0b1011, 0), LapicEffect::None);
    assert_eq!(lapic.write_window(0x380, 1000, 0), LapicEffect::None);
    let end = lapic.next_timer();
    assert_eq!(lapic.write_window(0x320, 0x200ec, 500), LapicEffect::None);
    assert_eq!(lapic.next_timer(), end);
    assert_eq!(lapic.write_window(0x320, 0x400ec, 500), LapicEffect::None);
    assert_eq!(lapic.next_timer(), None);
}

#[test]
fn an_end_of_interrupt_says_which() {
    let mut lapic = in_window(0);
    assert_eq!(lapic.write_window(0xb0, 0, 0), LapicEffect::None);
    lapic.request(0x41);
    lapic.accept(0x41);
    assert_eq!(lapic.write_window(0xb0, 7, 0), LapicEffect::Ended(0x41));
}

#[test]
fn registers_that_do_not_exist_are_errors() {
    let mut lapic = in_window(0);
    for offset in [0x3f0, 0x31, 0x1000] {
        assert_eq!(lapic.read_window(offset, 0), 0);
    }
    assert_eq!(lapic.read_window(0x40, 0), 0);
    assert_eq!(lapic.write_window(0x280, 0, 0), LapicEffect::None);
    assert_eq!(lapic.read_window(0x280, 0), ERROR_ILLEGAL_REGISTER);
}

#[test]
fn the_trigger_mode_shows_what_came_last() {
    let mut lapic = in_window(0);
    lapic.request(0x41);
    lapic.accept_level(0x41);
    assert_eq!(lapic.read_window(0x1a0, 0), 2);
    lapic.request(0x41);
    lapic.accept(0x41);
    assert_eq!(lapic.read_window(0x1a0, 0), 0);
}

#[test]
fn external_interrupts_pass_an_open_pin_and_no_apic() {
    let mut lapic = in_window(0);
    assert!(!lapic.passes_external());
    lapic.open_external();
    assert!(lapic.passes_external());
    assert_eq!(lapic.write_window(0x350, 0x1_0700, 0), LapicEffect::None);
    assert!(!lapic.passes_external());
    lapic.set_base(0xfee0_0100, 40).expect("off");
    assert!(lapic.passes_external());
}
