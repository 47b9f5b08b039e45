//! Models of the queue, explored by loom; see the log's models.

use loom::thread;

use crate::sync::Words;

use super::queue::{MESSAGE_WORDS, Queue, QueueSizes};

fn explore(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    let deeper = std::env::var("VIADUCT_LOOM_PREEMPTIONS").ok();
    let bound = deeper.and_then(|text| text.parse().ok());
    builder.preemption_bound = Some(bound.unwrap_or(preemptions));
    builder.max_branches = 50_000;
    builder.check(model);
}

fn queue(cells: usize) -> Queue {
    let sizes = QueueSizes {
        slots: 2,
        producers: 2,
        cells,
    };
    let words = Words::model(sizes.total_bytes() / 8);
    Queue::create_in(words, sizes).expect("legal")
}

fn receive(queue: &Queue) -> Option<(usize, u64)> {
    let mut message = [0; MESSAGE_WORDS];
    let producer = queue.receive(&mut message).expect("sound")?;
    assert!(message.iter().all(|word| *word == message[0]), "whole");
    Some((producer, message[0]))
}

/// Two producers, two consumers: each message comes out once and whole.
#[test]
fn each_message_is_received_once_and_whole() {
    explore(1, || {
        let queue = queue(1);
        let mut second = queue.producer(1).expect("two");
        let sender = thread::spawn(move || second.send(&[21; MESSAGE_WORDS]).expect("room"));
        let receiver = {
            let queue = queue.clone();
            thread::spawn(move || receive(&queue))
        };
        let mut first = queue.producer(0).expect("two");
        first.send(&[11; MESSAGE_WORDS]).expect("room");
        let mut seen = vec![];
        seen.extend(receive(&queue));
        sender.join().expect("no panic");
        seen.extend(receiver.join().expect("no panic"));
        while let Some(more) = receive(&queue) {
            seen.push(more);
        }
        seen.sort_unstable();
        assert_eq!(seen, [(0, 11), (1, 21)]);
    });
}

/// A cell is written again while a slow consumer still copies it: that one
/// must not believe its copy.
#[test]
fn a_cell_used_again_fools_no_slow_consumer() {
    explore(2, || {
        let queue = queue(1);
        let mut producer = queue.producer(0).expect("two");
        producer.send(&[1; MESSAGE_WORDS]).expect("room");
        let slow = {
            let queue = queue.clone();
            thread::spawn(move || receive(&queue))
        };
        let mut seen = vec![];
        seen.extend(receive(&queue));
        if producer.send(&[2; MESSAGE_WORDS]).is_ok() {
            seen.extend(receive(&queue));
        }
        seen.extend(slow.join().expect("no panic"));
        while let Some(more) = receive(&queue) {
            seen.push(more);
        }
        assert!(seen.windows(2).all(|pair| pair[0] != pair[1]), "{seen:?}");
    });
}

/// A sender and a receiver about to sleep don't miss each other.
#[test]
fn a_receiver_that_sleeps_is_rung_for() {
    explore(3, || {
        let queue = queue(1);
        let mut producer = queue.producer(0).expect("two");
        let sender = thread::spawn(move || {
            producer.send(&[1; MESSAGE_WORDS]).expect("room");
            producer.queue().wants_a_ring()
        });
        let sleeps = queue.may_sleep();
        let rung = sender.join().expect("no panic");
        assert!(!sleeps || rung);
    });
}
