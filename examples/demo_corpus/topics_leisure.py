"""Topic records of study, work, crafts and the outdoors, in the format of `topics`."""

LEISURE = """
study for exams | studying for exams | a teacher; a tutor
+ split the matter into [small|daily] parts
+ test yourself with [cards|old papers] rather than reading again
+ work for [thirty|forty] minutes, then take a short break
+ explain each point [aloud|to a friend]
+ sleep [well|eight hours] on the last night
- split the matter up
- test yourself daily
- take short breaks
- sleep well before
= recall builds memory better than [reading|marking lines]
= the first hour of the day is the [clearest|freshest]
? the exam date; the old papers; the notes
! late nights; gaps; panic

learn a language | learning a language | a teacher; a native speaker
+ learn [ten|twelve] words a day with cards
+ listen to [songs|stories] and repeat them aloud
+ speak with [a neighbour|a partner] twice a week
+ read [easy|short] books with pictures
+ write [three|four] lines about your day
- learn ten words daily
- speak every week
- read easy books
- listen and repeat
= short daily practice beats [long lessons|one long day]
= mistakes are how the ear [learns|grows]
? the accents; the spelling; the grammar book
! false friends; skipped days; wrong stress

play the guitar | playing the guitar | a guitar teacher; a musician
+ tune the strings from the [lowest|thickest] to the highest
+ learn [three|four] chords and switch between them
+ press the strings just behind the [frets|metal bars]
+ strum [slowly|evenly] with a soft wrist
+ practise [fifteen|twenty] minutes each day
- tune the strings
- learn three chords
- strum slowly
- practise each day
= fingertips harden in [two|three] weeks
= many songs use only [three|four] chords
? the tuning; the wrist; the strings
! sore fingers; a snapped string; a stiff wrist

draw a face | drawing a face | an art teacher; a painter
+ sketch an [oval|egg shape] and a line down the middle
+ put the eyes [halfway|on a line halfway] down the oval
+ leave one eye's width [between|from eye to eye]
+ place the nose and mouth in the lower [half|part]
+ shade one side with [soft|light] strokes
- sketch an oval
- put eyes halfway
- shade one side
- draw lightly first
= most people draw the eyes too [high|big]
= light strokes are easy to [rub out|change]
? the proportions; the light; the middle line
! smudges; stiff lines; a crooked mouth

write a letter | writing a letter | an editor; a teacher
+ begin with the [date|name] and a greeting
+ say why you write in the first [line|sentence]
+ give each [thought|point] its own paragraph
+ read the letter [aloud|once more] before you send it
+ end with [thanks|a question] and your name
- say why first
- keep paragraphs short
- read it aloud
- end with thanks
= short sentences are [easier|kinder] to read
= a letter written by hand is kept [longer|for years]
? the address; the names; the spelling
! a wrong name; smeared ink; angry lines

give a speech | giving a speech | a speaking coach; an actor
+ choose [one|a single] idea and three examples
+ write [key words|the first line] on a small card
+ practise aloud [three|four] times, standing
+ look at [one face|one person] for each sentence
+ pause [after|before] the main point
- choose one idea
- practise aloud
- look at faces
- pause and breathe
= an audience remembers [stories|examples], not lists
= nerves fade after the first [minute|lines]
? the microphone; the clock; the cards
! a dry mouth; rushing; a lost card

find a job | finding a job | a recruiter; a careers adviser
+ write a [one-page|short] summary of your work
+ ask [friends|old colleagues] who needs people
+ send [three|five] applications a week, each made to fit
+ practise answers to the [usual|ten usual] questions
+ thank the [firm|interviewer] the next day
- write one good page
- ask old colleagues
- send fitted applications
- practise your answers
= many jobs are never [advertised|posted]
= a short clear page is read [first|to the end]
? the dates; the contract; the spelling
! false offers; low pay; typing errors

move house | moving house | a mover; a removal firm
+ sort and give away [things|clothes] you no longer use
+ pack one room at a time and [label|number] every box
+ book the [van|truck] three weeks ahead
+ keep [keys, papers and tea|the first night's things] in one bag
+ read the [meters|gas meter] on the last day
- give things away
- label every box
- book the van early
- read the meters
= books belong in [small|little] boxes
= moving takes [twice|nearly twice] as long as planned
? the meters; the van size; the locks
! broken plates; sore backs; lost keys

take photos | taking photos | a photographer; a camera shop owner
+ stand with the [light|sun] behind you or beside you
+ step closer until the [subject|face] fills the frame
+ hold the camera with [both hands|elbows in]
+ put the subject [a third from the edge|off the middle]
+ take [three|five] shots and keep one
- mind the light
- step closer
- hold it steady
- take several shots
= morning light is [soft|softer] and golden
= a clean background makes a picture [calm|clear]
? the battery; the lens; the horizon
! blur; glare; a full card

knit a scarf | knitting a scarf | a knitter; a wool shop owner
+ choose [thick|soft] wool and large needles
+ cast on [thirty|forty] stitches without pulling tight
+ knit every row until it is [as long as you are tall|long enough]
+ count the stitches [every few rows|now and then]
+ cast off [loosely|gently] and weave in the ends
- cast on thirty stitches
- knit every row
- count your stitches
- cast off loosely
= thick wool grows [fast|quickly]
= even tension makes [even|neat] rows
? the stitch count; the tension; the wool label
! dropped stitches; tight rows; tangled wool

climb a hill | climbing a hill | a mountain guide; a ranger
+ start [early|after breakfast] and tell someone your way
+ wear [boots|layers] and carry a rain jacket
+ take [short|small] steps and keep an even pace
+ drink [water|a little] every half hour
+ turn back when [clouds gather|fog comes down]
- start early
- take short steps
- drink often
- carry a rain jacket
= weather turns [faster|sooner] on high ground
= the way down is harder on the [knees|legs]
? the map; the forecast; the boots
! fog; loose stones; thirst

drive in snow | driving in snow | a driving teacher; a rally driver
+ clear [all|every one] of the windows and lights
+ pull away [gently|softly] in a high gear
+ keep [three|four] times the usual distance
+ brake [early|softly] and steer without jerks
+ carry a [blanket|shovel] and warm clothes
- clear all windows
- pull away gently
- keep your distance
- brake early
= winter tyres grip [better|far better] below seven degrees
= bridges freeze [first|before the road]
? the tyres; the lights; the road report
! black ice; a skid; deep drifts

back up files | backing up files | an IT technician; a librarian
+ list the [folders|photos and papers] you would miss
+ copy them to [a second disk|an outside drive]
+ keep [another|one more] copy in another place
+ let a program copy them [every night|each week]
+ open a few [copies|files] to see that they work
- list the folders
- copy to another disk
- copy every week
- open a few copies
= disks fail [without warning|sooner or later]
= a copy in the same house is [half|only half] a copy
? the free space; the copies; the password
! a dead disk; an empty folder; a stolen laptop
"""
