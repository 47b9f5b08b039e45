//! Racks in the background: `up` starts a supervisor, a second copy of this
//! program that holds the rack, and waits for its word that the VM is up.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::machine::{Machine, Plan};
use crate::names::{HeldDir, RackName, RuntimeDir};
use crate::server::Server;
use crate::{progress, signals};

/// What a supervisor is told on its standard input.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    name: RackName,
    plan: Plan,
}

/// What it says on its standard output, one line each.
#[derive(Debug, Serialize, Deserialize)]
enum Word {
    Doing(String),
    Log(String),
    Up,
    Failed(String),
}

/// Refuses a name that is taken.
pub(crate) fn check_free(name: &RackName) -> Result<()> {
    match RuntimeDir::of(name)?.holder()? {
        None => Ok(()),
        Some(_) => Err(taken(name)),
    }
}

fn taken(name: &RackName) -> anyhow::Error {
    anyhow::anyhow!(
        "a rack named {name} is already up; stop it with: viaduct down --name {name}, or use \
         another --name"
    )
}

/// Takes a name for this process.
pub(crate) fn hold(name: &RackName) -> Result<Arc<HeldDir>> {
    let held = RuntimeDir::of(name)?.hold()?;
    held.map(Arc::new).ok_or_else(|| taken(name))
}

/// Starts a supervisor and waits until its VM is up.
pub(crate) fn start(name: &RackName, plan: Plan) -> Result<()> {
    let executable = std::env::current_exe().context("cannot find this program's own file")?;
    let mut child = Command::new(executable)
        .arg("supervise")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start the supervisor")?;
    let order = Order {
        name: name.clone(),
        plan,
    };
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let child = Arc::new(Mutex::new(child));
    let aborted = Arc::clone(&child);
    signals::at_end(move || stop(&mut lock(&aborted)));

    let mut stdin = stdin.context("cannot talk to the supervisor")?;
    let mut text = serde_json::to_vec(&order).context("cannot describe the rack")?;
    text.push(b'\n');
    let told = stdin.write_all(&text);
    drop(stdin);
    told.context("the supervisor has died at once")?;
    let stdout = stdout.context("cannot hear the supervisor")?;
    for line in BufReader::new(stdout).lines() {
        let line = line.context("cannot hear the supervisor")?;
        match serde_json::from_str(&line) {
            Ok(Word::Doing(what)) => progress::say(what),
            Ok(Word::Log(line)) => progress::print_line(&line),
            Ok(Word::Up) => {
                signals::keep();
                return Ok(());
            }
            Ok(Word::Failed(why)) => bail!(why),
            Err(_) => bail!("the supervisor says {line:?}; this is a defect"),
        }
    }
    let status = lock(&child)
        .wait()
        .context("cannot wait for the supervisor")?;
    bail!("the supervisor has died ({status}); see the system's log")
}

fn lock(child: &Mutex<Child>) -> std::sync::MutexGuard<'_, Child> {
    child.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends a supervisor that is starting, and waits for it to have cleaned up.
fn stop(child: &mut Child) {
    let pid = rustix::process::Pid::from_child(child);
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    for _ in 0..100 {
        if matches!(child.try_wait(), Ok(Some(_)) | Err(_)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(child.kill());
    drop(child.wait());
}

/// The supervisor's own life.
pub(crate) fn supervise() -> Result<()> {
    // A session of its own: no terminal's hang-up or Ctrl-C reaches it.
    rustix::process::setsid().context("supervise is for viaduct's own use; use viaduct up")?;
    let mut line = String::new();
    std::io::stdin()
        .read_line(&mut line)
        .context("cannot read the order")?;
    let order: Order = serde_json::from_str(&line)
        .context("supervise is for viaduct's own use; use viaduct up")?;
    std::env::set_current_dir("/").context("cannot leave the current folder")?;
    match bring_up(&order) {
        Ok(()) => {}
        Err(error) => {
            signals::wait_if_aborting();
            // Everything is gone when the launcher hears of it.
            signals::clean_up();
            say(&Word::Failed(crate::one_line(&error)));
            std::process::exit(1);
        }
    }
    say(&Word::Up);
    // The launcher goes away now and its pipe with it.
    loop {
        std::thread::park();
    }
}

/// Tells the launcher something; it may be gone.
fn say(word: &Word) {
    if let Ok(mut line) = serde_json::to_vec(word) {
        line.push(b'\n');
        drop(std::io::stdout().write_all(&line));
    }
}

fn bring_up(order: &Order) -> Result<()> {
    let held = hold(&order.name)?;
    let aborted = Arc::clone(&held);
    signals::at_end(move || aborted.clear());
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(held.dir().log())
        .context("cannot make the log")?;
    let log = Mutex::new(log);
    let verbose = order.plan.verbose;
    let sink: rack::LogSink = Arc::new(move |node, line| {
        let line = format!("node {}: {line}", node.0);
        if verbose {
            say(&Word::Log(line.clone()));
        }
        let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
        // A full disk must not stop the rack.
        drop(writeln!(log, "{line}"));
    });
    say(&Word::Doing("starting the rack".into()));
    let machine = Machine::start(&order.plan, &order.name.to_string(), Some(sink))?;
    let machine = Arc::new(machine);
    let aborted = Arc::clone(&machine);
    signals::at_end(move || aborted.power_off(Duration::ZERO));
    say(&Word::Doing("booting the guest".into()));
    // What is asked for while the guest boots waits for it.
    let (name, served) = (order.name.to_string(), Arc::clone(&machine));
    Server::start(name, served, held, || std::process::exit(0))?;
    machine.wait_up(&order.plan)
}
